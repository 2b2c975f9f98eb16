"""How languages write numbers, prices, dates and the days of the week, as Unicode's CLDR has them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Locale:
    """One language in one country."""

    # Separators: of groups of three digits, and of decimals.
    group: str
    decimal: str
    # With {amount}.
    currency: str
    # With {day}, {month} (a name), {number} (of the month) and {year}.
    dates: str
    # As dates use them, from January; none where dates have numbers.
    months: tuple[str, ...]
    # From Monday.
    weekdays: tuple[str, ...]
    # Decimals of a price.
    cents: int = 2
    digits: str = "0123456789"
    # Groups of two above the first thousand.
    lakhs: bool = False
    # What its calendar counts on top of our years.
    years: int = 0

    def number(self, value: float, decimals: int = 0) -> str:
        """A number of at least 0."""
        whole, _, fraction = f"{value:.{decimals}f}".partition(".")
        head, tail = whole[:-3], whole[-3:]
        step = 2 if self.lakhs else 3
        groups = [head[max(i - step, 0) : i] for i in range(len(head), 0, -step)][::-1]
        written = self.group.join([*groups, tail]) + (self.decimal + fraction if fraction else "")
        return written.translate(str.maketrans("0123456789", self.digits))

    def price(self, value: float) -> str:
        """An amount of the currency."""
        return self.currency.format(amount=self.number(value, self.cents))

    def date(self, day: int, month: int, year: int) -> str:
        """A day, whose month counts from 0."""
        name = self.months[month] if self.months else ""
        text = self.dates.format(day=day, month=name, number=month + 1, year=year + self.years)
        return text.translate(str.maketrans("0123456789", self.digits))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


_EAST_ASIAN = "{year}年{number}月{day}日"
LOCALES = {
    "en": Locale(
        ",", ".", "${amount}", "{month} {day}, {year}",
        _names("January|February|March|April|May|June|July|August|September|October|November|December"),
        _names("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"),
    ),
    "de": Locale(
        ".", ",", "{amount} €", "{day}. {month} {year}",
        _names("Januar|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember"),
        _names("Montag|Dienstag|Mittwoch|Donnerstag|Freitag|Samstag|Sonntag"),
    ),
    "fr": Locale(
        " ", ",", "{amount} €", "{day} {month} {year}",
        _names("janvier|février|mars|avril|mai|juin|juillet|août|septembre|octobre|novembre|décembre"),
        _names("lundi|mardi|mercredi|jeudi|vendredi|samedi|dimanche"),
    ),
    "es": Locale(
        ".", ",", "{amount} €", "{day} de {month} de {year}",
        _names("enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|octubre|noviembre|diciembre"),
        _names("lunes|martes|miércoles|jueves|viernes|sábado|domingo"),
    ),
    "it": Locale(
        ".", ",", "{amount} €", "{day} {month} {year}",
        _names("gennaio|febbraio|marzo|aprile|maggio|giugno|luglio|agosto|settembre|ottobre|novembre|dicembre"),
        _names("lunedì|martedì|mercoledì|giovedì|venerdì|sabato|domenica"),
    ),
    "pt": Locale(
        ".", ",", "R$ {amount}", "{day} de {month} de {year}",
        _names("janeiro|fevereiro|março|abril|maio|junho|julho|agosto|setembro|outubro|novembro|dezembro"),
        _names("segunda-feira|terça-feira|quarta-feira|quinta-feira|sexta-feira|sábado|domingo"),
    ),
    "nl": Locale(
        ".", ",", "€ {amount}", "{day} {month} {year}",
        _names("januari|februari|maart|april|mei|juni|juli|augustus|september|oktober|november|december"),
        _names("maandag|dinsdag|woensdag|donderdag|vrijdag|zaterdag|zondag"),
    ),
    "pl": Locale(
        " ", ",", "{amount} zł", "{day} {month} {year}",
        _names("stycznia|lutego|marca|kwietnia|maja|czerwca|lipca|sierpnia|września|października|listopada|grudnia"),
        _names("poniedziałek|wtorek|środa|czwartek|piątek|sobota|niedziela"),
    ),
    "tr": Locale(
        ".", ",", "₺{amount}", "{day} {month} {year}",
        _names("Ocak|Şubat|Mart|Nisan|Mayıs|Haziran|Temmuz|Ağustos|Eylül|Ekim|Kasım|Aralık"),
        _names("Pazartesi|Salı|Çarşamba|Perşembe|Cuma|Cumartesi|Pazar"),
    ),
    "vi": Locale(
        ".", ",", "{amount} ₫", "{day} tháng {number}, {year}", (),
        _names("Thứ Hai|Thứ Ba|Thứ Tư|Thứ Năm|Thứ Sáu|Thứ Bảy|Chủ Nhật"), cents=0,
    ),
    "ru": Locale(
        " ", ",", "{amount} ₽", "{day} {month} {year} г.",
        _names("января|февраля|марта|апреля|мая|июня|июля|августа|сентября|октября|ноября|декабря"),
        _names("понедельник|вторник|среда|четверг|пятница|суббота|воскресенье"),
    ),
    "uk": Locale(
        " ", ",", "{amount} ₴", "{day} {month} {year} р.",
        _names("січня|лютого|березня|квітня|травня|червня|липня|серпня|вересня|жовтня|листопада|грудня"),
        _names("понеділок|вівторок|середа|четвер|пʼятниця|субота|неділя"),
    ),
    "el": Locale(
        ".", ",", "{amount} €", "{day} {month} {year}",
        _names(
            "Ιανουαρίου|Φεβρουαρίου|Μαρτίου|Απριλίου|Μαΐου|Ιουνίου|Ιουλίου|Αυγούστου|Σεπτεμβρίου|Οκτωβρίου|Νοεμβρίου"
            "|Δεκεμβρίου"
        ),
        _names("Δευτέρα|Τρίτη|Τετάρτη|Πέμπτη|Παρασκευή|Σάββατο|Κυριακή"),
    ),
    "he": Locale(
        ",", ".", "{amount} ₪", "{day} ב{month} {year}",
        _names("ינואר|פברואר|מרץ|אפריל|מאי|יוני|יולי|אוגוסט|ספטמבר|אוקטובר|נובמבר|דצמבר"),
        _names("יום שני|יום שלישי|יום רביעי|יום חמישי|יום שישי|יום שבת|יום ראשון"),
    ),
    "ar": Locale(
        "٬", "٫", "{amount} ج.م.", "{day} {month} {year}",
        _names("يناير|فبراير|مارس|أبريل|مايو|يونيو|يوليو|أغسطس|سبتمبر|أكتوبر|نوفمبر|ديسمبر"),
        _names("الاثنين|الثلاثاء|الأربعاء|الخميس|الجمعة|السبت|الأحد"),
        digits="٠١٢٣٤٥٦٧٨٩",
    ),
    "hi": Locale(
        ",", ".", "₹{amount}", "{day} {month} {year}",
        _names("जनवरी|फ़रवरी|मार्च|अप्रैल|मई|जून|जुलाई|अगस्त|सितंबर|अक्तूबर|नवंबर|दिसंबर"),
        _names("सोमवार|मंगलवार|बुधवार|गुरुवार|शुक्रवार|शनिवार|रविवार"),
        lakhs=True,
    ),
    "th": Locale(
        ",", ".", "฿{amount}", "{day} {month} {year}",
        _names("มกราคม|กุมภาพันธ์|มีนาคม|เมษายน|พฤษภาคม|มิถุนายน|กรกฎาคม|สิงหาคม|กันยายน|ตุลาคม|พฤศจิกายน|ธันวาคม"),
        _names("วันจันทร์|วันอังคาร|วันพุธ|วันพฤหัสบดี|วันศุกร์|วันเสาร์|วันอาทิตย์"),
        years=543,
    ),
    "zh": Locale(
        ",", ".", "¥{amount}", _EAST_ASIAN, (), _names("星期一|星期二|星期三|星期四|星期五|星期六|星期日"),
    ),
    "ja": Locale(
        ",", ".", "¥{amount}", _EAST_ASIAN, (), _names("月曜日|火曜日|水曜日|木曜日|金曜日|土曜日|日曜日"), cents=0,
    ),
    "ko": Locale(
        ",", ".", "₩{amount}", "{year}년 {number}월 {day}일", (),
        _names("월요일|화요일|수요일|목요일|금요일|토요일|일요일"), cents=0,
    ),
}  # fmt: skip
