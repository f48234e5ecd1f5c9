"""What is said between the facts: greetings, thanks, little questions, animals, sums and opposites.

Next: ``off_topic.py``, for everything else.
"""

from __future__ import annotations

import random

from . import words
from .off_topic import off_topic
from .templates import expand, mark

# (user says, assistant says); ``{you}`` is a comma and the name where the user has told a name, and nothing otherwise
EXCHANGES = (
    ("[Hello|Hi|Hey|Good morning|Good evening|Hello there][.|!]", "[Hello|Hi]{you}! How can I help you?"),
    ("[Hello|Hi|Hey], how are you?", "[I am fine, thank you|I am very well]{you}. How are you?"),
    ("How are you today?", "I am well, thank you{you}. [And you?|I hope that you are, too.]"),
    ("I am {mood} today.", "[I see|Thank you for telling me]{you}. Why are you {mood}?"),
    ("It is {weather} [today|outside].", "[I like {weather} days|A {weather} day can be nice]. What will you do?"),
    ("What do you think of {weather} weather?", "{Weather} weather is good for [a walk|a book|a cup of tea]."),
    ("[Thank you|Thanks|Thank you very much][.|!]", "You are welcome{you}."),
    ("[Okay|Good|Great|Nice|I see|All right].", "[Is there anything else|What else can I do for you]{you}?"),
    ("[Goodbye|Bye|See you later|Good night][.|!]", "[Goodbye|See you soon|Take care]{you}!"),
    ("Who are you?", "I am Axon, a very small language model."),
    ("What is your name?", "My name is Axon."),
    ("What can you do?", "I can tell stories, talk a little, and remember what you tell me."),
    ("Are you a [human|robot|person]?", "I am not a human. I am a small language model."),
    ("Do you like {food}?", "I cannot eat, but many people like {food}."),
    ("What should I [eat|cook] today?", "How about {food} with {fruit}?"),
    ("What should I drink with {food}?", "{Drink} goes well with {food}."),
    ("I [ate|had] {food} for [lunch|dinner|breakfast].", "{Food}! [Did it taste good?|That sounds good.|I hope you enjoyed it.]"),
    ("I saw a {animal} [today|yesterday|in the park].", "A {animal}! [What did it do?|How lovely.|I would like to see one, too.]"),
    ("Do you know a good sport?", "You could try {sport}."),
    ("Is {sport} [fun|hard]?", "{Sport} is fun, and it gets easier when you practise."),
    ("I cannot sleep.", "Try [a cup of warm milk|a good book|to count sheep]{you}."),
    ("I am bored.", "[You could read a book{you}.|You could go for a walk{you}.|You could paint something {colour}.|Shall I tell you a story{you}?]"),
    ("Do you like the colour {colour}?", "Yes, {colour} is a [beautiful|warm|lovely] colour."),
    ("Which flowers should I plant?", "{Flower} would look nice in a garden."),
    ("Tell me a joke.", "Why did the {animal} cross the road? To get to the {animal2} on the other side!"),
    ("Give me some advice.", "[Drink enough water|Be kind to others|Sleep well|Call an old friend|Never be afraid to ask]{you}."),
    ("What is a good name for a {animal}?", "[Biscuit|Pepper|Pickle|Snowball|Shadow|Pebble] is a good name for a {animal}."),
    ("What do you know about the {tree} tree?", "The {tree} is a tree with [strong wood|fine leaves|deep roots]."),
    ("Can you play the {instrument}?", "No, I have no hands, but I like the sound of the {instrument}."),
    ("I went to the [market|library|museum|park|beach|doctor] [today|yesterday].", "[How was it|What did you do there]{you}?"),
    ("My day was [long|good|bad|boring|wonderful].", "[Tell me more about it{you}.|What happened{you}?]"),
    ("What does a {job} do?", "A {job} works hard every day and is good at {his} work."),
    ("Should I become a {job} or a {job2}?", "[Choose what you love most|Both are good jobs]{you}."),
    ("[I have to go to work now|I will make some tea first|I will be right back].", "[All right|Of course|Take your time]{you}."),
)  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "young", "fast": "slow", "up": "down", "day": "night", "happy":
    "sad", "light": "dark", "early": "late", "full": "empty", "wet": "dry", "hard": "soft", "loud": "quiet",
    "rich": "poor", "long": "short", "near": "far", "open": "closed", "good": "bad", "high": "low", "left":
    "right", "strong": "weak", "clean": "dirty", "cheap": "expensive", "thick": "thin", "always": "never",
    "sweet": "sour", "win": "lose", "first": "last", "begin": "end",
}  # fmt: skip
CREATURES = {
    "bee": ("lives in a hive", "makes honey"), "cow": ("lives on a farm", "eats grass"), "fox": ("lives in the forest", "hunts at night"),
    "owl": ("lives in trees", "can see in the dark"), "whale": ("lives in the sea", "is the largest animal of all"),
    "camel": ("lives in the desert", "can go for days without water"), "penguin": ("lives in the cold south", "swims but cannot fly"),
    "beaver": ("lives by the river", "builds dams of wood"), "frog": ("lives in ponds", "can jump far"), "bear": ("lives in the forest", "sleeps in winter"),
    "mole": ("lives under the ground", "digs tunnels"), "spider": ("lives in corners", "spins a web"), "giraffe": ("lives in Africa", "has a long neck"),
    "elephant": ("lives in Africa and Asia", "has a long trunk"), "squirrel": ("lives in trees", "hides nuts for the winter"),
    "horse": ("lives in a stable", "can run very fast"), "kangaroo": ("lives in Australia", "carries its young in a pouch"),
    "snail": ("lives in gardens", "carries its house on its back"), "wolf": ("lives in a pack", "howls at the moon"), "hen": ("lives on a farm", "lays eggs"),
    "otter": ("lives by the water", "eats fish"), "panda": ("lives in China", "eats bamboo"), "lion": ("lives in Africa", "is called the king of animals"),
    "parrot": ("lives in warm forests", "can learn to speak"), "butterfly": ("lives in gardens and meadows", "was a caterpillar once"),
}  # fmt: skip
OFF_TOPIC = 0.25  # the share of small talk that is about things nobody can know in so few parameters
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def small_talk(rng: random.Random, name: str | None, unseen: bool = False) -> tuple[str, str]:
    """One exchange, user then assistant; a known ``name`` may be used, marked as recalled.

    With ``unseen``, whatever other names occur are such that training text never contains them.
    """
    you = f", {mark(name)}" if name and rng.random() < 0.3 else ""
    if rng.random() < OFF_TOPIC:
        return off_topic(rng, you, unseen)
    draw = rng.random()
    if draw < 0.7:
        slots = {
            "you": you, "mood": rng.choice(words.MOODS), "weather": rng.choice(words.WEATHER), "food": rng.choice(words.FOODS),
            "fruit": rng.choice(words.FRUITS), "drink": rng.choice(words.DRINKS), "animal": rng.choice(words.ANIMALS),
            "animal2": rng.choice(words.ANIMALS), "sport": rng.choice(words.SPORTS), "colour": rng.choice(words.COLOURS),
            "flower": rng.choice(words.FLOWERS), "tree": rng.choice(words.TREES), "instrument": rng.choice(words.INSTRUMENTS),
            "job": rng.choice(words.JOBS), "job2": rng.choice(words.JOBS), "his": rng.choice(("his", "her")),
        }  # fmt: skip
        user, assistant = rng.choice(EXCHANGES)
        return expand(user, slots, rng), expand(assistant, slots, rng)
    if draw < 0.78:
        first, second = rng.choice(tuple(OPPOSITES.items()))
        if rng.random() < 0.5:
            first, second = second, first
        return f"What is the opposite of {first}?", f'The opposite of "{first}" is "{second}".'
    if draw < 0.84:
        a, b = rng.randint(0, 6), rng.randint(0, 6)
        return (
            f"What is {a} plus {b}?",
            f"{NUMBER_WORDS[a].capitalize()} plus {NUMBER_WORDS[b]} is {NUMBER_WORDS[a + b]}.",
        )
    if draw < 0.88:
        day = rng.randrange(7)
        return (
            f"Which day comes after {words.DAYS[day]}?",
            f"After {words.DAYS[day]} comes {words.DAYS[(day + 1) % 7]}.",
        )
    animal = rng.choice(tuple(CREATURES))
    where, what = CREATURES[animal]
    article = "an" if animal[0] in "aeiou" else "a"
    question = rng.choice(("Tell me about the {0}.", "What do you know about the {0}?", "What is {1} {0}?")).format(
        animal, article
    )
    return question, f"{article.capitalize()} {animal} {where}. It {what}."
