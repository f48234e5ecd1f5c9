"""What a very small model cannot do: questions it has no answer to, and remarks about things it has never heard of.

Without these, it answers a question about France with a syllable over and over. The topics come in many forms and partly
from nowhere (composed words), so that what is learnt is to recognise the unknown, not a list of it.
"""

from __future__ import annotations

import random

from .names import person, town
from .templates import expand

TOPICS = tuple(
    topic.strip()
    for topic in """photosynthesis, quantum physics, the moon, the French Revolution, bicycle repair, chess, the stock market,
    black holes, the internet, programming, Python, machine learning, robots, electric cars, the weather forecast, taxes,
    insurance, a mortgage, the climate, volcanoes, earthquakes, dinosaurs, the Roman Empire, ancient Egypt, Shakespeare,
    poetry, grammar, algebra, geometry, fractions, chemistry, atoms, the heart, the brain, vitamins, headaches, medicine,
    vaccines, sleep, dreams, yoga, marathon running, the Olympics, the World Cup, basketball rules, jazz, classical music,
    guitar chords, photography, oil painting, film history, robots in films, video games, board games, magic tricks, knitting,
    carpentry, plumbing, a bicycle tyre, a broken window, my computer, my phone, a password, an email, a letter to my boss,
    a speech, a business plan, marketing, statistics, history, geography, the capital of France, the capital of Japan,
    the longest river, the highest mountain, the deepest ocean, the population of India, rice farming, coffee beans, baking
    bread, a chocolate cake, pancakes, soup for ten people, a garden pond, tomatoes, bees and flowers, bird migration, sharks,
    coral reefs, rain forests, deserts, glaciers, satellites, rockets, Mars, gravity, light, sound waves, magnets, electricity,
    batteries, solar panels, wind power, nuclear energy, oil prices, politics, elections, the law, human rights, philosophy,
    ethics, religion, art, architecture, bridges, trains, aeroplanes, ships, traffic, a holiday in Spain, hotels, languages,
    Latin, Korean, sign language, translation, a crossword, a riddle, prime numbers, infinity, time travel, ghosts""".split(
        ","
    )
)
QUESTIONS = (
    "[What is|What's] {topic}?", "[Can|Could] you explain {topic}[?|, please?| to me?]", "[Please explain|Explain] {topic}.",
    "[How does|How do I|How can I understand] {topic} [work|begin|change]?", "Why is {topic} [important|so hard|interesting]?",
    "[What do you know|What can you tell me|Do you know anything] about {topic}?", "[When|Where] was {topic} [invented|found]?",
    "[Write|Please write] [a poem|an essay|a song|a program] about {topic}.", "Who [invented|discovered|wrote about] {topic}?",
    "How [do|can] I [fix|make|learn|buy|cook|draw|build] {topic}?", "What is {a} [times|divided by] {b}?", "What is {a}{b} + {b}{a}?",
    "[Translate|Spell|Summarise|Define] {topic}[.|, please.]", "Is {topic} [dangerous|expensive|real|far away]?", "What's the capital of {place}?",
    "Who is {person}?", "Where is {place}?", "[Tell me something|Give me a fact|I want to learn] about {topic}.", "Which is better, {topic} or {topic2}?",
)  # fmt: skip
DO_NOT_KNOW = (
    "[I am sorry{you}, but I|I am afraid that I|Sorry{you}, I] [do not know that|cannot help with that].",
    "[That is too hard for me{you}.|That is beyond me{you}.|I have not learnt that{you}.] I am a very small model.",
    "I do not know much about that{you}. [I can tell you a story instead.|I am only a small model.]",
)
REMARKS = (
    "[I read|I heard|I talked] [a lot|something] about {topic} [today|yesterday|last week].", "My [brother|boss|friend] loves {topic}.",
    "I [saw|watched] a [film|programme] about {topic} [last night|yesterday].", "The [traffic|bus|train|noise] was [horrible|late|terrible] this morning.",
    "{Topic} [is|was] [hard|great|strange|on my mind today].", "[lol|ok|hm|yes|no|sure|maybe|well|cool|wow][.|!|]", "I am thinking about {topic}.",
    "[Anyway|By the way], {topic} is [fun|boring].", "I have to [call|meet|write to] {person} later.", "We drove through {place} [today|on Sunday].",
)  # fmt: skip
HM = (
    "[I see|How nice|That is interesting|That sounds good|Thank you for telling me|Oh]{you}.",
    "[Tell me more{you}.|What do you like about it?|What else can I do for you{you}?]",
)


def off_topic(rng: random.Random, you: str, unseen: bool = False) -> tuple[str, str]:
    """One exchange about something the model knows nothing of; ``you`` is how the user is addressed, or empty.

    With ``unseen``, names and invented words are such that training text never contains them.
    """
    slots = {
        "you": you, "topic": _topic(rng, unseen), "topic2": _topic(rng, unseen), "person": person(rng, unseen), "place": town(rng, unseen),
        "a": str(rng.randint(2, 99)), "b": str(rng.randint(2, 99)),
    }  # fmt: skip
    asks = rng.random() < 0.65
    user, assistant = (QUESTIONS, DO_NOT_KNOW) if asks else (REMARKS, HM)
    said = expand(rng.choice(user), slots, rng)
    return said[0].upper() + said[1:] if rng.random() < 0.8 else said, expand(rng.choice(assistant), slots, rng)


def _topic(rng: random.Random, unseen: bool) -> str:
    """Something from the list, or a word that does not exist."""
    return rng.choice(TOPICS) if rng.random() < 0.8 else person(rng, unseen).lower()
