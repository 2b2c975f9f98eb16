"""Captions of scenes in twelve languages, from clauses that need no inflection.

Pictogram names come in the nominative singular, without an article. So every clause keeps the name as it is and adds
something that agrees with nothing: an adverb of place, a number of times, a background. Plain, but never wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Phrases:
    """The clauses of one language; {x} stands for a name."""

    # Place of an object, by position.
    left: str
    right: str
    top: str
    bottom: str
    centre: str
    # The same object two and three times.
    two: str
    three: str
    # Backgrounds, in the order of BACKGROUNDS.
    backgrounds: tuple[str, ...]
    # What stands between clauses.
    join: str = ", "


BACKGROUNDS = ("white", "blue", "green", "pink", "yellow", "grey", "purple", "orange")

PHRASES = {
    "en": Phrases(
        "{x} on the left", "{x} on the right", "{x} at the top", "{x} at the bottom", "{x} in the centre",
        "two times {x}", "three times {x}",
        ("white background", "light blue background", "light green background", "pink background",
         "light yellow background", "grey background", "light purple background", "light orange background"),
    ),
    "de": Phrases(
        "{x} links", "{x} rechts", "{x} oben", "{x} unten", "{x} in der Mitte",
        "zwei Mal {x}", "drei Mal {x}",
        ("weißer Hintergrund", "hellblauer Hintergrund", "hellgrüner Hintergrund", "rosa Hintergrund",
         "hellgelber Hintergrund", "grauer Hintergrund", "helllila Hintergrund", "hellorangefarbener Hintergrund"),
    ),
    "es": Phrases(
        "{x} a la izquierda", "{x} a la derecha", "{x} arriba", "{x} abajo", "{x} en el centro",
        "dos veces {x}", "tres veces {x}",
        ("fondo blanco", "fondo azul claro", "fondo verde claro", "fondo rosa",
         "fondo amarillo claro", "fondo gris", "fondo morado claro", "fondo naranja claro"),
    ),
    "fr": Phrases(
        "{x} à gauche", "{x} à droite", "{x} en haut", "{x} en bas", "{x} au centre",
        "deux fois {x}", "trois fois {x}",
        ("fond blanc", "fond bleu clair", "fond vert clair", "fond rose",
         "fond jaune clair", "fond gris", "fond violet clair", "fond orange clair"),
    ),
    "it": Phrases(
        "{x} a sinistra", "{x} a destra", "{x} in alto", "{x} in basso", "{x} al centro",
        "due volte {x}", "tre volte {x}",
        ("sfondo bianco", "sfondo azzurro", "sfondo verde chiaro", "sfondo rosa",
         "sfondo giallo chiaro", "sfondo grigio", "sfondo viola chiaro", "sfondo arancione chiaro"),
    ),
    "pt": Phrases(
        "{x} à esquerda", "{x} à direita", "{x} em cima", "{x} embaixo", "{x} no centro",
        "duas vezes {x}", "três vezes {x}",
        ("fundo branco", "fundo azul-claro", "fundo verde-claro", "fundo rosa",
         "fundo amarelo-claro", "fundo cinza", "fundo roxo-claro", "fundo laranja-claro"),
    ),
    "ru": Phrases(
        "{x} слева", "{x} справа", "{x} сверху", "{x} снизу", "{x} в центре",
        "два раза {x}", "три раза {x}",
        ("белый фон", "голубой фон", "светло-зелёный фон", "розовый фон",
         "светло-жёлтый фон", "серый фон", "светло-фиолетовый фон", "светло-оранжевый фон"),
    ),
    "tr": Phrases(
        "solda {x}", "sağda {x}", "üstte {x}", "altta {x}", "ortada {x}",
        "iki {x}", "üç {x}",  # Turkish counts in the singular
        ("beyaz arka plan", "açık mavi arka plan", "açık yeşil arka plan", "pembe arka plan",
         "açık sarı arka plan", "gri arka plan", "açık mor arka plan", "açık turuncu arka plan"),
    ),
    "zh": Phrases(
        "左边是{x}", "右边是{x}", "上面是{x}", "下面是{x}", "中间是{x}",
        "两个{x}", "三个{x}",
        ("白色背景", "浅蓝色背景", "浅绿色背景", "粉色背景", "浅黄色背景", "灰色背景", "浅紫色背景", "浅橙色背景"),
        join="，",
    ),
    "ja": Phrases(
        "左に{x}", "右に{x}", "上に{x}", "下に{x}", "中央に{x}",
        "{x}が二つ", "{x}が三つ",
        ("白い背景", "水色の背景", "薄緑の背景", "ピンクの背景",
         "薄黄色の背景", "灰色の背景", "薄紫の背景", "薄オレンジの背景"),
        join="、",
    ),
    "ko": Phrases(
        "왼쪽에 {x}", "오른쪽에 {x}", "위쪽에 {x}", "아래쪽에 {x}", "가운데에 {x}",
        "{x} 두 개", "{x} 세 개",
        ("흰색 배경", "하늘색 배경", "연두색 배경", "분홍색 배경",
         "연노란색 배경", "회색 배경", "연보라색 배경", "연주황색 배경"),
    ),
    "ar": Phrases(
        "{x} على اليسار", "{x} على اليمين", "{x} في الأعلى", "{x} في الأسفل", "{x} في الوسط",
        "{x} مرتين", "{x} ثلاث مرات",
        ("خلفية بيضاء", "خلفية زرقاء فاتحة", "خلفية خضراء فاتحة", "خلفية وردية",
         "خلفية صفراء فاتحة", "خلفية رمادية", "خلفية بنفسجية فاتحة", "خلفية برتقالية فاتحة"),
        join="، ",
    ),
}  # fmt: skip

LANGUAGES = tuple(PHRASES)


def describe(names: Sequence[str], positions: Sequence[str], background: str, language: str) -> str:
    """Caption of objects called `names` at `positions` on `background`.

    All positions empty means one object, or the same one two or three times; `background` "" is left out.
    """
    phrases = PHRASES[language]
    if len(names) > 1 and not any(positions):
        clauses = [{2: phrases.two, 3: phrases.three}[len(names)].replace("{x}", names[0])]
    else:
        places = [getattr(phrases, position) if position else "{x}" for position in positions]
        clauses = [place.replace("{x}", name) for place, name in zip(places, names)]
    if background:
        clauses.append(phrases.backgrounds[BACKGROUNDS.index(background)])
    return phrases.join.join(clauses)
