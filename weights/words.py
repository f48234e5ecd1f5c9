"""The vocabulary of the training text: the closed word classes that stories and dialogues draw from.

Only lists live here. Names, which must be unlimited so that copying is learnt instead of a list, are composed in
``names.py``.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(","))


COLOURS = _words(
    """red, blue, green, yellow, orange, purple, pink, brown, black, white, grey, silver, gold, turquoise, violet,
    crimson, scarlet, indigo, lavender, beige, cream, coral, amber, olive, navy, teal, maroon, lilac, emerald, peach,
    bronze, ivory, mint, rose, ruby, copper, mustard, magenta, cyan, chestnut"""
)
ANIMALS = _words(
    """cat, dog, rabbit, fox, mouse, bear, owl, squirrel, hedgehog, frog, duck, goose, hen, horse, pony, donkey, goat,
    sheep, cow, pig, turtle, otter, badger, beaver, deer, wolf, lion, tiger, elephant, monkey, parrot, penguin, seal,
    dolphin, whale, snail, ladybird, bee, butterfly, crow, robin, sparrow, swan, mole, lizard, hamster, kitten, puppy,
    camel, panda, koala, kangaroo, zebra, giraffe, raccoon, ferret, canary, falcon, pigeon, tortoise, lamb, pelican"""
)
PETS = _words(
    """cat, dog, rabbit, hamster, parrot, canary, turtle, goldfish, pony, lizard, mouse, kitten, puppy, ferret, hen,
    duck, goat, pigeon, hedgehog, snail, tortoise, guinea pig, donkey, frog"""
)
FRUITS = _words(
    """apples, pears, plums, cherries, grapes, bananas, oranges, lemons, peaches, figs, melons, strawberries,
    raspberries, blueberries, apricots, mangoes, kiwis, blackberries, pineapples, dates"""
)
FOODS = _words(
    """pizza, soup, pasta, rice, bread, cheese, pancakes, waffles, salad, noodles, dumplings, porridge, stew, curry,
    potatoes, mushrooms, honey, chocolate, ice cream, carrot cake, apple pie, popcorn, omelettes, tomatoes, beans,
    fish, sandwiches, muffins, sausages, lentils, toast, pumpkin, spinach, peanuts, walnuts, yoghurt, corn"""
)
DRINKS = _words(
    """tea, coffee, milk, lemonade, water, apple juice, orange juice, cocoa, ginger beer, mint tea, grape juice,
    buttermilk, green tea, tomato juice, hot chocolate, iced tea"""
)
FLOWERS = _words("roses, tulips, daisies, lilies, sunflowers, poppies, violets, daffodils, orchids, bluebells, irises")
SPORTS = _words(
    """tennis, football, swimming, running, rowing, chess, hockey, golf, skating, skiing, cycling, climbing, sailing,
    basketball, archery, badminton, surfing, fencing, judo, volleyball"""
)
SEASONS = _words("spring, summer, autumn, winter")
TREES = _words("oak, pine, willow, birch, maple, elm, ash, beech, cedar, chestnut, fir, hazel, linden, poplar")
SUBJECTS = _words(
    "maths, history, music, art, science, geography, biology, drawing, reading, physics, chemistry, Latin"
)
INSTRUMENTS = _words(
    "piano, violin, guitar, flute, drums, cello, harp, trumpet, clarinet, banjo, accordion, organ, ukulele, trombone"
)
JOBS = _words(
    """baker, teacher, nurse, doctor, farmer, gardener, painter, carpenter, tailor, sailor, pilot, cook, driver,
    librarian, plumber, potter, engineer, writer, singer, dancer, actor, builder, barber, blacksmith, clockmaker,
    dentist, fisherman, florist, judge, lawyer, mechanic, miner, musician, photographer, postman, shepherd, shoemaker,
    translator, vet, waiter, weaver, beekeeper, firefighter, architect, chemist, guard"""
)
OBJECTS = _words(
    """keys, umbrella, glasses, wallet, phone, book, hat, scarf, gloves, watch, ring, bag, coat, camera, notebook, pen,
    ticket, passport, map, lamp, basket, hammer, scissors, diary, letter, brush, boots, torch, flute, mirror, necklace,
    suitcase, blanket, kettle, teapot, violin, ball, kite, drum, candle, compass, spoon, ladder, knife"""
)
THINGS = _words(
    """car, bicycle, house, door, coat, hat, bag, boat, umbrella, kitchen, scarf, kite, tent, bed, chair, garden gate,
    roof, lamp, phone, jacket, sofa, dress, backpack, motorbike, piano, fence, cup, truck, notebook, carpet"""
)
COUNTED = _words(
    """books, marbles, stamps, coins, shells, pencils, hats, plants, spoons, buttons, postcards, cups, chairs, balloons,
    stickers, clocks, dolls, paintings, candles, apples, cousins, hens, sheep, goats, fish, ducks, bees, kites"""
)
SPOTS = _words(
    """under the bed, on the kitchen table, behind the sofa, in the blue drawer, on the top shelf, in the garden shed,
    next to the door, inside the old chest, beside the window, in the cupboard, on the piano, under the stairs, in the
    car, behind the clock, on the windowsill, in the attic, in the cellar, under the pillow, in the basket, by the
    fireplace, in the hall, on the bench, behind the curtain, in the red box, under the rug, in the wardrobe, on the
    roof, at the office, in the barn, between two books, on top of the fridge, in the bathroom"""
)
MONTHS = _words("January, February, March, April, May, June, July, August, September, October, November, December")
DAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
RELATIVES = _words(
    """sister, brother, mother, father, aunt, uncle, cousin, grandmother, grandfather, best friend, neighbour, teacher,
    boss, son, daughter, wife, husband, niece, nephew, doctor, roommate, coach, dentist, baker, gardener"""
)
NAMED_THINGS = _words("boat, horse, doll, school, street, band, village, ship, teddy bear, robot, company, team, club")
HER_NAMES = _words(
    """Anna, Clara, Emma, Grace, Ida, Kate, Mia, Nora, Rosa, Tina, Wanda, Alice, Bella, Daisy, Fiona, Hannah, Julia,
    Lily, Nina, Ruby, Una, Vera, Zoe, Amy, Chloe, Diana, Elena, Eva, Gloria, Greta, Irene, Jane, Laura, Lena,
    Linda, Lucy, Maria, Martha, Mary, Maya, Molly, Olga, Olivia, Rachel, Sara, Sofia, Stella, Susan, Yara,
    Zara, Aisha, Ananya, Mei, Yuki, Ama, Fatima, Lucia, Elif, Freya, Ingrid, Astrid, Marie, Amelie, Giulia,
    Chiara, Zofia, Katya, Natasha, Priya, Leila, Nadia, Catherine, Elizabeth, Isabella, Jennifer, Jessica,
    Margaret, Penelope, Rebecca, Stephanie, Valentina, Victoria"""
)
HIS_NAMES = _words(
    """Ben, David, Felix, Henry, Jack, Leo, Oscar, Paul, Sam, Victor, Carl, Edward, George, Isaac, Karl, Max, Oliver,
    Peter, Simon, Tom, Will, Adam, Andrew, Boris, Charlie, Daniel, Eric, Frank, Hugo, Ivan, James, John,
    Jonas, Lucas, Mark, Martin, Michael, Milo, Nathan, Omar, Patrick, Pedro, Robert, Robin, Ryan, Theo,
    Thomas, Tim, Toby, Walter, Yusuf, Ali, Amir, Arjun, Chen, Li, Hiro, Kenji, Kofi, Hassan, Ibrahim, Jorge,
    Carlos, Diego, Emre, Lars, Sven, Bjorn, Pierre, Luc, Marco, Paolo, Olek, Marek, Dmitri, Ravi, Sanjay,
    Samir, Tariq, Alexander, Benjamin, Christopher, Gabriel, Jonathan, Joseph, Matthew, Nicholas, Samuel,
    Sebastian, Timothy, William"""
)
CITIES = _words(
    """London, Paris, Berlin, Rome, Madrid, Lisbon, Vienna, Prague, Oslo, Stockholm, Helsinki, Dublin, Athens, Cairo,
    Lagos, Nairobi, Mumbai, Delhi, Tokyo, Kyoto, Seoul, Beijing, Shanghai, Sydney, Toronto, Chicago, Boston, Seattle,
    Denver, Lima, Bogota, Havana, Warsaw, Budapest, Zurich, Geneva, Milan, Naples, Porto, Bremen, Hamburg, Munich,
    Krakow, Riga, Istanbul, Ankara, Tunis, Accra, Dakar, Hanoi, Manila, Jakarta, Auckland, Quito, Santiago"""
)
MOODS = _words("happy, tired, excited, a little sad, bored, calm, hungry, busy, cheerful, nervous, proud, sleepy")
WEATHER = _words("sunny, rainy, windy, cold, warm, cloudy, snowy, foggy, stormy, hot, grey, lovely")
