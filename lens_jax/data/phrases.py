"""The clauses of captions in twelve languages, none of which needs inflection.

Pictogram names come in the nominative singular, without an article. So every name stays as it is, and what is said of
it stands behind it in brackets and agrees with nothing: an adverb of place, a number of times. Plain, but never wrong;
and a text encoder that reads a prompt in parts finds the bare name. English has a second, natural form (`english.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrases:
    """The clauses of one language; {x} stands for a name or a word."""

    # Place of an object or a word, by position.
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
    # What stands between clauses, and around what is said of a name.
    join: str = ", "
    brackets: str = " ()"


BACKGROUNDS = ("white", "blue", "green", "pink", "yellow", "grey", "purple", "orange")

PHRASES = {
    "en": Phrases(
        "on the left", "on the right", "at the top", "at the bottom", "in the centre",
        "at the top left", "at the top right", "at the bottom left", "at the bottom right",
        "two times", "three times", "four times",
        "small", "large",
        "to the left of {x}", "to the right of {x}", "above {x}", "below {x}",
        'the word "{x}"',
        ("white background", "light blue background", "light green background", "pink background",
         "light yellow background", "grey background", "light purple background", "light orange background"),
    ),
    "de": Phrases(
        "links", "rechts", "oben", "unten", "in der Mitte",
        "oben links", "oben rechts", "unten links", "unten rechts",
        "zwei Mal", "drei Mal", "vier Mal",
        "klein", "groß",
        "links von {x}", "rechts von {x}", "über {x}", "unter {x}",
        'das Wort "{x}"',
        ("weißer Hintergrund", "hellblauer Hintergrund", "hellgrüner Hintergrund", "rosa Hintergrund",
         "hellgelber Hintergrund", "grauer Hintergrund", "helllila Hintergrund", "hellorangefarbener Hintergrund"),
    ),
    "es": Phrases(
        "a la izquierda", "a la derecha", "arriba", "abajo", "en el centro",
        "arriba a la izquierda", "arriba a la derecha", "abajo a la izquierda", "abajo a la derecha",
        "dos veces", "tres veces", "cuatro veces",
        "en pequeño", "en grande",
        "a la izquierda de {x}", "a la derecha de {x}", "encima de {x}", "debajo de {x}",
        'la palabra "{x}"',
        ("fondo blanco", "fondo azul claro", "fondo verde claro", "fondo rosa",
         "fondo amarillo claro", "fondo gris", "fondo morado claro", "fondo naranja claro"),
    ),
    "fr": Phrases(
        "à gauche", "à droite", "en haut", "en bas", "au centre",
        "en haut à gauche", "en haut à droite", "en bas à gauche", "en bas à droite",
        "deux fois", "trois fois", "quatre fois",
        "en petit", "en grand",
        "à gauche de {x}", "à droite de {x}", "au-dessus de {x}", "en dessous de {x}",
        'le mot "{x}"',
        ("fond blanc", "fond bleu clair", "fond vert clair", "fond rose",
         "fond jaune clair", "fond gris", "fond violet clair", "fond orange clair"),
    ),
    "it": Phrases(
        "a sinistra", "a destra", "in alto", "in basso", "al centro",
        "in alto a sinistra", "in alto a destra", "in basso a sinistra", "in basso a destra",
        "due volte", "tre volte", "quattro volte",
        "in piccolo", "in grande",
        "a sinistra di {x}", "a destra di {x}", "sopra {x}", "sotto {x}",
        'la parola "{x}"',
        ("sfondo bianco", "sfondo azzurro", "sfondo verde chiaro", "sfondo rosa",
         "sfondo giallo chiaro", "sfondo grigio", "sfondo viola chiaro", "sfondo arancione chiaro"),
    ),
    "pt": Phrases(
        "à esquerda", "à direita", "em cima", "embaixo", "no centro",
        "em cima à esquerda", "em cima à direita", "embaixo à esquerda", "embaixo à direita",
        "duas vezes", "três vezes", "quatro vezes",
        "em tamanho pequeno", "em tamanho grande",
        "à esquerda de {x}", "à direita de {x}", "acima de {x}", "abaixo de {x}",
        'a palavra "{x}"',
        ("fundo branco", "fundo azul-claro", "fundo verde-claro", "fundo rosa",
         "fundo amarelo-claro", "fundo cinza", "fundo roxo-claro", "fundo laranja-claro"),
    ),
    "ru": Phrases(
        "слева", "справа", "сверху", "снизу", "в центре",
        "сверху слева", "сверху справа", "снизу слева", "снизу справа",
        "два раза", "три раза", "четыре раза",
        "маленького размера", "большого размера",
        "слева от объекта {x}", "справа от объекта {x}", "над объектом {x}", "под объектом {x}",
        'слово "{x}"',
        ("белый фон", "голубой фон", "светло-зелёный фон", "розовый фон",
         "светло-жёлтый фон", "серый фон", "светло-фиолетовый фон", "светло-оранжевый фон"),
    ),
    "tr": Phrases(
        "solda", "sağda", "üstte", "altta", "ortada",
        "sol üstte", "sağ üstte", "sol altta", "sağ altta",
        "iki tane", "üç tane", "dört tane",
        "küçük", "büyük",
        "{x} nesnesinin solunda", "{x} nesnesinin sağında", "{x} nesnesinin üstünde", "{x} nesnesinin altında",
        '"{x}" kelimesi',
        ("beyaz arka plan", "açık mavi arka plan", "açık yeşil arka plan", "pembe arka plan",
         "açık sarı arka plan", "gri arka plan", "açık mor arka plan", "açık turuncu arka plan"),
    ),
    "zh": Phrases(
        "在左边", "在右边", "在上面", "在下面", "在中间",
        "在左上角", "在右上角", "在左下角", "在右下角",
        "两个", "三个", "四个",
        "小", "大",
        "在{x}的左边", "在{x}的右边", "在{x}的上面", "在{x}的下面",
        '文字"{x}"',
        ("白色背景", "浅蓝色背景", "浅绿色背景", "粉色背景", "浅黄色背景", "灰色背景", "浅紫色背景", "浅橙色背景"),
        join="，", brackets="（）",
    ),
    "ja": Phrases(
        "左に", "右に", "上に", "下に", "中央に",
        "左上に", "右上に", "左下に", "右下に",
        "二つ", "三つ", "四つ",
        "小さい", "大きい",
        "{x}の左", "{x}の右", "{x}の上", "{x}の下",
        "「{x}」という文字",
        ("白い背景", "水色の背景", "薄緑の背景", "ピンクの背景",
         "薄黄色の背景", "灰色の背景", "薄紫の背景", "薄オレンジの背景"),
        join="、", brackets="（）",
    ),
    "ko": Phrases(
        "왼쪽에", "오른쪽에", "위쪽에", "아래쪽에", "가운데에",
        "왼쪽 위에", "오른쪽 위에", "왼쪽 아래에", "오른쪽 아래에",
        "두 개", "세 개", "네 개",
        "작게", "크게",
        "{x} 왼쪽", "{x} 오른쪽", "{x} 위", "{x} 아래",
        '"{x}"라는 글자',
        ("흰색 배경", "하늘색 배경", "연두색 배경", "분홍색 배경",
         "연노란색 배경", "회색 배경", "연보라색 배경", "연주황색 배경"),
    ),
    "ar": Phrases(
        "على اليسار", "على اليمين", "في الأعلى", "في الأسفل", "في الوسط",
        "أعلى اليسار", "أعلى اليمين", "أسفل اليسار", "أسفل اليمين",
        "مرتين", "ثلاث مرات", "أربع مرات",
        "بحجم صغير", "بحجم كبير",
        "على يسار {x}", "على يمين {x}", "فوق {x}", "تحت {x}",
        'كلمة "{x}"',
        ("خلفية بيضاء", "خلفية زرقاء فاتحة", "خلفية خضراء فاتحة", "خلفية وردية",
         "خلفية صفراء فاتحة", "خلفية رمادية", "خلفية بنفسجية فاتحة", "خلفية برتقالية فاتحة"),
        join="، ",
    ),
}  # fmt: skip

LANGUAGES = tuple(PHRASES)
