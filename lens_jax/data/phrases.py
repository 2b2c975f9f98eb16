"""The clauses of captions in twelve languages, none of which needs inflection.

Pictogram names come in the nominative singular, without an article. So every clause keeps the name as it is and adds
something that agrees with nothing: an adverb of place, a number of times, a background. Plain, but never wrong. English
has a second, natural form (`english.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrases:
    """The clauses of one language; {x} stands for a name, or for what `word` says."""

    # Place of an object, by position.
    left: str
    right: str
    top: str
    bottom: str
    centre: str
    top_left: str
    top_right: str
    bottom_left: str
    bottom_right: str
    # The same object two, three and four times.
    two: str
    three: str
    four: str
    # Its size.
    small: str
    large: str
    # Where the object named before is, seen from {x}.
    left_of: str
    right_of: str
    above: str
    below: str
    # A written word.
    word: str
    # Backgrounds, in the order of BACKGROUNDS.
    backgrounds: tuple[str, ...]
    # What stands between clauses.
    join: str = ", "


BACKGROUNDS = ("white", "blue", "green", "pink", "yellow", "grey", "purple", "orange")

PHRASES = {
    "en": Phrases(
        "{x} on the left", "{x} on the right", "{x} at the top", "{x} at the bottom", "{x} in the centre",
        "{x} at the top left", "{x} at the top right", "{x} at the bottom left", "{x} at the bottom right",
        "two times {x}", "three times {x}", "four times {x}",
        "small {x}", "large {x}",
        "to the left of {x}", "to the right of {x}", "above {x}", "below {x}",
        'the word "{x}"',
        ("white background", "light blue background", "light green background", "pink background",
         "light yellow background", "grey background", "light purple background", "light orange background"),
    ),
    "de": Phrases(
        "{x} links", "{x} rechts", "{x} oben", "{x} unten", "{x} in der Mitte",
        "{x} oben links", "{x} oben rechts", "{x} unten links", "{x} unten rechts",
        "zwei Mal {x}", "drei Mal {x}", "vier Mal {x}",
        "{x} in klein", "{x} in groß",
        "links von {x}", "rechts von {x}", "über {x}", "unter {x}",
        'das Wort "{x}"',
        ("weißer Hintergrund", "hellblauer Hintergrund", "hellgrüner Hintergrund", "rosa Hintergrund",
         "hellgelber Hintergrund", "grauer Hintergrund", "helllila Hintergrund", "hellorangefarbener Hintergrund"),
    ),
    "es": Phrases(
        "{x} a la izquierda", "{x} a la derecha", "{x} arriba", "{x} abajo", "{x} en el centro",
        "{x} arriba a la izquierda", "{x} arriba a la derecha", "{x} abajo a la izquierda", "{x} abajo a la derecha",
        "dos veces {x}", "tres veces {x}", "cuatro veces {x}",
        "{x} en pequeño", "{x} en grande",
        "a la izquierda de {x}", "a la derecha de {x}", "encima de {x}", "debajo de {x}",
        'la palabra "{x}"',
        ("fondo blanco", "fondo azul claro", "fondo verde claro", "fondo rosa",
         "fondo amarillo claro", "fondo gris", "fondo morado claro", "fondo naranja claro"),
    ),
    "fr": Phrases(
        "{x} à gauche", "{x} à droite", "{x} en haut", "{x} en bas", "{x} au centre",
        "{x} en haut à gauche", "{x} en haut à droite", "{x} en bas à gauche", "{x} en bas à droite",
        "deux fois {x}", "trois fois {x}", "quatre fois {x}",
        "{x} en petit", "{x} en grand",
        "à gauche de {x}", "à droite de {x}", "au-dessus de {x}", "en dessous de {x}",
        'le mot "{x}"',
        ("fond blanc", "fond bleu clair", "fond vert clair", "fond rose",
         "fond jaune clair", "fond gris", "fond violet clair", "fond orange clair"),
    ),
    "it": Phrases(
        "{x} a sinistra", "{x} a destra", "{x} in alto", "{x} in basso", "{x} al centro",
        "{x} in alto a sinistra", "{x} in alto a destra", "{x} in basso a sinistra", "{x} in basso a destra",
        "due volte {x}", "tre volte {x}", "quattro volte {x}",
        "{x} in piccolo", "{x} in grande",
        "a sinistra di {x}", "a destra di {x}", "sopra {x}", "sotto {x}",
        'la parola "{x}"',
        ("sfondo bianco", "sfondo azzurro", "sfondo verde chiaro", "sfondo rosa",
         "sfondo giallo chiaro", "sfondo grigio", "sfondo viola chiaro", "sfondo arancione chiaro"),
    ),
    "pt": Phrases(
        "{x} à esquerda", "{x} à direita", "{x} em cima", "{x} embaixo", "{x} no centro",
        "{x} em cima à esquerda", "{x} em cima à direita", "{x} embaixo à esquerda", "{x} embaixo à direita",
        "duas vezes {x}", "três vezes {x}", "quatro vezes {x}",
        "{x} em tamanho pequeno", "{x} em tamanho grande",
        "à esquerda de {x}", "à direita de {x}", "acima de {x}", "abaixo de {x}",
        'a palavra "{x}"',
        ("fundo branco", "fundo azul-claro", "fundo verde-claro", "fundo rosa",
         "fundo amarelo-claro", "fundo cinza", "fundo roxo-claro", "fundo laranja-claro"),
    ),
    "ru": Phrases(
        "{x} слева", "{x} справа", "{x} сверху", "{x} снизу", "{x} в центре",
        "{x} сверху слева", "{x} сверху справа", "{x} снизу слева", "{x} снизу справа",
        "два раза {x}", "три раза {x}", "четыре раза {x}",
        "{x} маленького размера", "{x} большого размера",
        "слева от объекта {x}", "справа от объекта {x}", "над объектом {x}", "под объектом {x}",
        'слово "{x}"',
        ("белый фон", "голубой фон", "светло-зелёный фон", "розовый фон",
         "светло-жёлтый фон", "серый фон", "светло-фиолетовый фон", "светло-оранжевый фон"),
    ),
    "tr": Phrases(
        "solda {x}", "sağda {x}", "üstte {x}", "altta {x}", "ortada {x}",
        "sol üstte {x}", "sağ üstte {x}", "sol altta {x}", "sağ altta {x}",
        "iki {x}", "üç {x}", "dört {x}",  # Turkish counts in the singular
        "küçük {x}", "büyük {x}",
        "{x} nesnesinin solunda", "{x} nesnesinin sağında", "{x} nesnesinin üstünde", "{x} nesnesinin altında",
        '"{x}" kelimesi',
        ("beyaz arka plan", "açık mavi arka plan", "açık yeşil arka plan", "pembe arka plan",
         "açık sarı arka plan", "gri arka plan", "açık mor arka plan", "açık turuncu arka plan"),
    ),
    "zh": Phrases(
        "左边是{x}", "右边是{x}", "上面是{x}", "下面是{x}", "中间是{x}",
        "左上角是{x}", "右上角是{x}", "左下角是{x}", "右下角是{x}",
        "两个{x}", "三个{x}", "四个{x}",
        "小{x}", "大{x}",
        "在{x}的左边", "在{x}的右边", "在{x}的上面", "在{x}的下面",
        '文字"{x}"',
        ("白色背景", "浅蓝色背景", "浅绿色背景", "粉色背景", "浅黄色背景", "灰色背景", "浅紫色背景", "浅橙色背景"),
        join="，",
    ),
    "ja": Phrases(
        "左に{x}", "右に{x}", "上に{x}", "下に{x}", "中央に{x}",
        "左上に{x}", "右上に{x}", "左下に{x}", "右下に{x}",
        "{x}が二つ", "{x}が三つ", "{x}が四つ",
        "小さい{x}", "大きい{x}",
        "{x}の左", "{x}の右", "{x}の上", "{x}の下",
        "「{x}」という文字",
        ("白い背景", "水色の背景", "薄緑の背景", "ピンクの背景",
         "薄黄色の背景", "灰色の背景", "薄紫の背景", "薄オレンジの背景"),
        join="、",
    ),
    "ko": Phrases(
        "왼쪽에 {x}", "오른쪽에 {x}", "위쪽에 {x}", "아래쪽에 {x}", "가운데에 {x}",
        "왼쪽 위에 {x}", "오른쪽 위에 {x}", "왼쪽 아래에 {x}", "오른쪽 아래에 {x}",
        "{x} 두 개", "{x} 세 개", "{x} 네 개",
        "작은 {x}", "큰 {x}",
        "{x} 왼쪽", "{x} 오른쪽", "{x} 위", "{x} 아래",
        '"{x}"라는 글자',
        ("흰색 배경", "하늘색 배경", "연두색 배경", "분홍색 배경",
         "연노란색 배경", "회색 배경", "연보라색 배경", "연주황색 배경"),
    ),
    "ar": Phrases(
        "{x} على اليسار", "{x} على اليمين", "{x} في الأعلى", "{x} في الأسفل", "{x} في الوسط",
        "{x} أعلى اليسار", "{x} أعلى اليمين", "{x} أسفل اليسار", "{x} أسفل اليمين",
        "{x} مرتين", "{x} ثلاث مرات", "{x} أربع مرات",
        "{x} بحجم صغير", "{x} بحجم كبير",
        "على يسار {x}", "على يمين {x}", "فوق {x}", "تحت {x}",
        'كلمة "{x}"',
        ("خلفية بيضاء", "خلفية زرقاء فاتحة", "خلفية خضراء فاتحة", "خلفية وردية",
         "خلفية صفراء فاتحة", "خلفية رمادية", "خلفية بنفسجية فاتحة", "خلفية برتقالية فاتحة"),
        join="، ",
    ),
}  # fmt: skip

LANGUAGES = tuple(PHRASES)
