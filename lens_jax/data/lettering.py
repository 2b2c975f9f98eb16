"""Words as ink: which are written in scenes, and how.

Each letter has a square of its own, so that it can be told from its neighbours in an image of 64 pixels.
"""

import functools

import numpy as np

from lens_jax.errors import LensError

INK = (24, 24, 24)
# name -> (module of the package that carries it, its name there).
FONTS = {
    "roboto": ("font_roboto", "RobotoBold"),
    "fredoka": ("font_fredoka_one", "FredokaOne"),
    "caladea": ("font_caladea", "CaladeaBold"),
}
# Height of a capital, as a part of its square's side.
CAPITAL = 0.8

_WORDS = """
ACE ACT AGE AIR ANT APE ARC ARM ART ASH BAG BAR BAT BAY BED BEE BIG BOX BOY BUS CAB CAN CAP CAR CAT COW CUP DAY DEN
DOG DOT DRY EAR EGG ELF END EYE FAN FAR FIG FIN FIT FLY FOG FOX FUN GAS GEM GUM HAT HEN HOT HUT ICE INK JAM JAR JET
JOY KEY KID KIT LAB LEG LID LIP LOG MAP MIX MUD NET NEW NUT OAK OIL OWL PAN PEN PET PIE PIG PIN POT RED RUN SEA SKY
SUN TAX TEA TEN TIP TOP TOY VAN WAX WEB WIN ZOO AREA BABY BALL BAND BANK BEAR BELL BIRD BLUE BOAT BOOK CAFE CAKE CALM
CARD CITY CLUB COLD COOL CORN DARK DEEP DESK DOOR DUCK EAST ECHO EXIT FACE FARM FAST FIRE FISH FIVE FOOD FOUR FREE
FROG GAME GATE GIFT GOAL GOLD GOOD HAND HELP HERO HILL HOME HOPE IDEA IRON JAZZ JUMP JUNE KIND KING KIWI LAKE LAMP
LEAF LENS LIFE LIME LION LOVE LUCK MAGIC MILK MOON NEST NICE NOON NOTE OPEN OVEN PARK PEAR PINK PLAY PLUM POND POOL
QUIZ RAIN RING ROAD ROCK ROOM ROSE SALE SALT SAND SHIP SHOP SNOW SOUP STAR STOP SWIM TAXI TEAM TIDE TIME TREE TUNA
VASE VIEW WALK WARM WAVE WEST WILD WIND WOLF WOOD WORK YEAR YOGA ZERO ZONE ANGEL APPLE BEACH BREAD BRICK BRUSH CANDY
CHAIR CHESS CLOUD COCOA CORAL CREAM DANCE DREAM EAGLE EARTH FIELD FLAME FLOUR FRESH FRUIT GHOST GIANT GLASS GRAPE
GREEN HAPPY HEART HONEY HORSE HOTEL HOUSE JELLY JUICE LEMON LIGHT LUNCH MANGO MAPLE METAL MOUSE MUSIC NIGHT NORTH
OCEAN OLIVE ONION PAINT PANDA PAPER PARTY PEACE PEACH PIANO PILOT PIZZA PLANT QUEEN QUICK RADIO RIVER ROBOT SALAD
SMILE SOUTH SPICE STONE STORM SUGAR SUNNY SWEET TABLE TIGER TOAST TRAIN TULIP VIDEO WATER WHALE WORLD ZEBRA ALMOND
BAKERY BANANA BASKET BOTTLE BRIDGE BUTTER CACTUS CAMERA CANDLE CARROT CASTLE CHEESE CHERRY CINEMA CIRCLE COFFEE COOKIE
COPPER CORNER COTTON DESERT DINNER DRAGON FLOWER FOREST FRIEND GARDEN GINGER GUITAR HAMMER ISLAND JUNGLE KITTEN LIZARD
MARBLE MARKET MUSEUM ORANGE OYSTER PEPPER PIRATE PLANET POTATO RABBIT ROCKET SALMON SCHOOL SILVER SPRING SUMMER SUNSET
TEMPLE TICKET TOMATO TURTLE VALLEY VELVET VIOLET WALNUT WINDOW WINTER WIZARD YELLOW
"""
WORDS = tuple(_WORDS.split())


def random_word(rng: np.random.Generator) -> str:
    """Three to six capital letters, the short ones more often: half of them words, half of them letters at random.

    A model that saw only words learns them as pictures; random letters make it spell.
    """
    length = int(rng.choice([3, 4, 5, 6], p=[0.4, 0.3, 0.18, 0.12]))
    if rng.random() < 0.5:
        fitting = [word for word in WORDS if len(word) == length]
        return fitting[rng.integers(len(fitting))]
    return "".join(chr(ord("A") + i) for i in rng.integers(26, size=length))


def letters(text: str, font: str, side: int):
    """The ink of `text`, a PIL image of mode L: a square of `side` pixels for each letter."""
    from PIL import Image

    ink = Image.new("L", (side * len(text), side))
    for i, letter in enumerate(text):
        ink.paste(_letter(letter, font, side), (i * side, 0))
    return ink


@functools.lru_cache(maxsize=1024)
def _letter(letter: str, font: str, side: int):
    """One letter in the middle of its square, a capital four fifths as high as that."""
    from PIL import Image, ImageDraw

    # Drawn large once and scaled down: hinting would give a letter another shape at every size.
    face = _face(font)
    left, _, right, _ = face.getbbox(letter)
    _, top, _, _ = face.getbbox("H")
    square = int(_capital(font) / CAPITAL)
    canvas = Image.new("L", (square, square))
    # The widest letters fill their square: a W of Roboto is 1.25 as wide as a capital is high.
    corner = ((square - (right - left)) / 2 - left, (1 - CAPITAL) * square * 0.4 - top)
    ImageDraw.Draw(canvas).text(corner, letter, fill=255, font=face)
    return canvas.resize((side, side), Image.Resampling.LANCZOS)


_LARGE = 96


@functools.cache
def _capital(font: str) -> int:
    """Height of an H of `_face`, pixels."""
    _, top, _, bottom = _face(font).getbbox("H")
    return bottom - top


@functools.cache
def _face(font: str):
    import importlib

    from PIL import ImageFont

    if font not in FONTS:
        raise LensError(f"font {font!r}: accepted are {', '.join(FONTS)}")
    module, name = FONTS[font]
    try:
        file = importlib.import_module(module).font_files[name]
    except ImportError:
        raise LensError(f'the package {module} is missing: pip install "lens-jax[demo]"') from None
    return ImageFont.truetype(file, _LARGE, layout_engine=ImageFont.Layout.BASIC)
