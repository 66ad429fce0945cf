"""Texts in every script, written or composed for the tokenizer vectors; used by make_tokenizer_fixtures.py."""
import random
import unicodedata

PHRASES = """
The moon looks down on the quiet sea, and nobody's there to see it; we'll go home at 10:45.
I've 3 apples, you'd have 12, they're all red. DON'T SHOUT, IT'S LATE, WE'RE TIRED, I'LL SLEEP.
Der Fluss fließt langsam durchs Tal; über den Bergen ziehen Wölkchen – schön, nicht?
L'été dernier, nous avons marché jusqu'à la rivière : « quel silence ! » dit-elle à 9 h 30.
El niño preguntó: ¿dónde está el barquito? ¡Allí, junto al molino viejo!
A maré subiu e o coração do pescador também; não há pressa às 7 horas.
La luna guarda il mare, e perché mai dovrebbe dormire? Così è la notte.
Księżyc patrzy na morze, żółta łódź śpi przy brzegu; źdźbło trawy drży.
Měsíc hledí na moře, příliš žluťoučký člun spí u břehu, říkají rybáři.
A hold a tengerre néz, az őszi szél fűszálakat fésül, és hűvös az éj.
Luna privește marea, iar bărcuța își așteaptă stăpânul până dimineață.
Ay denize bakıyor, küçük kayık kıyıda uyuyor; İstanbul'da gece ığıl ığıl.
Mặt trăng nhìn xuống biển lặng, chiếc thuyền nhỏ ngủ bên bờ từ lúc 8 giờ.
Kuu katsoo merelle, pieni vene nukkuu yöllä rannassa; älä herätä sitä.
Tunglið horfir á hafið, báturinn sefur við ströndina; þögnin er æðisleg.
Mae'r lleuad yn edrych ar y môr, a'r cwch bach yn cysgu wrth y tŷ.
Tá an ghealach ag féachaint ar an bhfarraige, agus tá an bád ina chodladh.
La luno rigardas la maron; ĉu la ŝipeto dormas ĝis ĵaŭdo?
Mwezi unaangalia bahari, na mashua ndogo imelala ufukweni.
Òṣùpá ń wo òkun, ọkọ̀ ojú omi kékeré náà sì ń sùn ní etí òkun.
Το φεγγάρι κοιτάζει τη θάλασσα, και η μικρή βάρκα κοιμάται στην ακτή.
Ἐν ἀρχῇ ἦν ὁ λόγος τῆς νυκτός, καὶ ἡ σελήνη ἐσίγα.
Луна смотрит на тихое море, а лодочка спит у берега с 22:15.
Місяць дивиться на море, човен спить біля берега, і їжак шукає їжу.
Луната гледа морето, а малката лодка спи на брега, щом падне нощта.
Месец гледа море, а мали чамац спава крај обале; љубичица ћути.
Ай теңизге карап турат, кичинекей кайык жээкте уктап жатат.
Сар далай руу харж, жижиг завь эрэгт унтаж байна.
Լուսինը նայում է ծովին, իսկ փոքրիկ նավակը քնած է ափին։
მთვარე ზღვას უყურებს, პატარა ნავი კი ნაპირთან ძინავს.
הירח מביט אל הים השקט, והסירה הקטנה ישנה ליד החוף.
די לבֿנה קוקט אױפֿן ים, און דאָס שיפֿל שלאָפֿט.
القمر ينظر إلى البحر الهادئ، والقارب الصغير نائم عند الشاطئ منذ الساعة ٩.
ماه به دریا نگاه می‌کند و قایق کوچک کنار ساحل خوابیده است؛ ساعت ۱۲ است.
چاند سمندر کو دیکھ رہا ہے اور چھوٹی کشتی کنارے پر سو رہی ہے۔
चाँद शांत समुद्र को देख रहा है, और छोटी नाव किनारे पर सो रही है। १२३
चंद्र समुद्राकडे पाहतो आहे आणि छोटी होडी किनाऱ्यावर झोपली आहे.
চাঁদ শান্ত সমুদ্রের দিকে তাকিয়ে আছে, ছোট নৌকাটি তীরে ঘুমিয়ে আছে। ৪৫৬
ਚੰਦ ਸਮੁੰਦਰ ਵੱਲ ਵੇਖ ਰਿਹਾ ਹੈ, ਨਿੱਕੀ ਬੇੜੀ ਕੰਢੇ ਸੁੱਤੀ ਪਈ ਹੈ।
ચંદ્ર શાંત દરિયા તરફ જુએ છે, નાની હોડી કિનારે સૂતી છે.
ଜହ୍ନ ଶାନ୍ତ ସମୁଦ୍ରକୁ ଚାହୁଁଛି, ଛୋଟ ଡଙ୍ଗା କୂଳରେ ଶୋଇଛି।
நிலா அமைதியான கடலைப் பார்க்கிறது, சிறிய படகு கரையில் தூங்குகிறது.
చంద్రుడు ప్రశాంతమైన సముద్రాన్ని చూస్తున్నాడు, చిన్న పడవ ఒడ్డున నిద్రిస్తోంది.
ಚಂದ್ರನು ಶಾಂತ ಸಮುದ್ರವನ್ನು ನೋಡುತ್ತಿದ್ದಾನೆ, ಸಣ್ಣ ದೋಣಿ ದಡದಲ್ಲಿ ಮಲಗಿದೆ.
ചന്ദ്രൻ ശാന്തമായ കടലിനെ നോക്കുന്നു, ചെറിയ തോണി കരയിൽ ഉറങ്ങുന്നു.
සඳ නිසල මුහුද දෙස බලයි, කුඩා ඔරුව වෙරළේ නිදයි.
พระจันทร์มองทะเลอันเงียบสงบ เรือลำน้อยหลับอยู่ริมฝั่ง ๑๒๓
ພະຈັນເບິ່ງທະເລທີ່ງຽບສະຫງົບ ເຮືອນ້ອຍນອນຢູ່ແຄມຝັ່ງ
လမင်းက တိတ်ဆိတ်သော ပင်လယ်ကို ကြည့်နေသည်၊ လှေငယ် ကမ်းစပ်၌ အိပ်နေသည်။ ၁၂၃
ព្រះច័ន្ទមើលទៅសមុទ្រស្ងប់ស្ងាត់ ទូកតូចដេកនៅមាត់ច្រាំង ១២៣
ཟླ་བས་རྒྱ་མཚོ་ལ་ལྟ། གྲུ་ཆུང་འགྲམ་ལ་ཉལ། ༡༢༣
ጨረቃ ጸጥ ያለውን ባሕር ትመለከታለች፤ ትንሿ ጀልባ በዳርቻው ተኝታለች። ፩፪፫
月亮望着平静的大海,小船在岸边睡着了。现在是12点30分!
月亮望著平靜的大海,小船在岸邊睡著了。「為什麼?」她問。
月が静かな海を見ている。小さなボートは岸で眠っている。カタカナもテスト、12時30分。
달이 고요한 바다를 바라보고, 작은 배는 물가에서 잠들어 있다. 오후 3시 15분.
ᏅᏓ ᎠᎺᏉᎯ ᎠᎦᏖᎭ, ᏥᏳ ᎤᏍᏗ ᎦᎵᎭ.
ᑕᖅᑭᖅ ᑕᕆᐅᕐᒥᒃ ᑕᑯᕗᖅ, ᐅᒥᐊᕋᓛᖅ ᓯᓂᒃᐳᖅ.
ⴰⵢⵢⵓⵔ ⴰⵔ ⵉⵜⵎⵓⵇⵇⵓⵍ ⵙ ⵉⵍⵍ.
""".strip().split("\n")

CODE = [
    "for (int i = 0; i < n; ++i) {\n    sum += x[i] * 1e-3f;\n}\n",
    "def area(r):\n\treturn 3.14159 * r ** 2  # square\n\n\nprint(area(10))",
    "SELECT name, COUNT(*) FROM boats WHERE length >= 12 GROUP BY name;",
    "<p class=\"note\">caf&eacute; &amp; th\u00e9</p>\r\n<br/>\r\n",
    "{\"id\": 17, \"tags\": [\"a\", \"b\"], \"ok\": null}",
    "x_1 = a->b[0x1F] ^ ~c; // TODO: isn't that it's own?",
    "https://example.org/path?q=1&r=2#top  user@example.org",
    "git commit -m 'don''t' && make -j8 2>&1 | tail -n 5",
    "\\frac{1}{2} \\alpha^{3}_{ij} $$",
    "+----+----+\n| a  | b  |\n+----+----+\n",
]
EDGES = [
    "", " ", "  ", "   ", "a", " a", "  a", "a ", "a  ", "a  b", "a   b  ", "\n", "\n\n", " \n", "\n ", " \n ", "\n\n\n a", "a\n\n\nb", "a \n\n b", "\t", "\t\t a",
    "\r\n", "\r\n\r\n", "a\r\nb", "\r", "x\r\r\ny", "  \r\n  \n  z", "1", "12", "123", "1234", "12345", "1234567890", " 1", "  1", "   12", "1 2  3   4", "a1", "1a",
    "a 1", "a  1", "a\n1", "1\n", "1 ", "1  ", "-1", "3.14", "1,000,000", "1e10", "0x1F", "v2.0.1", "\u00b2\u00b3", "x\u00b2 + y\u00b3", "\u00bd cup", "\u2167 \u2168", "\u0663\u0664", "\u0967\u0968 \u0969",
    "'s", "'S", "it's", "IT'S", "it\u2019s", "'sam", " 's", "''s", "'t 're 've 'm 'll 'd", "'T 'RE 'Ve 'M 'lL 'D", "'r", "'v", "'l", "'x", "'", "''", "can't've", "y'all'd", "'\u017f", "a'\u017fb",
    "...", "!!!", " !!", "! !", "?!\n", "?!\n\n x", "--", "-- --", "a--b", "a -- b", "(a)", " (a) ", "[1]", "{ }", "\"q\"", "\u201cq\u201d", "\u2014", "a\u2014b", "\u2026",
    "\u00a0", "a\u00a0b", "\u00a0\u00a0a", " \u00a0 a", "\u2003x", "\u3000\u3000x", "\u2028a\u2029b", "\u0085a", "\u200ba", "a\u200bb", "\u200d", "\ufeffa", "\u00ada",
    "e\u0301", "\u0301", " \u0301", "a\u0301 b\u0308", "n\u0303o", "\u1e69", "\ufb01 \ufb02", "\u01c5", "\u0130\u0131", "\u00df\u1e9e", "\u2126\u212b", "\ufffd", "\ufffd\ufffd a", "\ue000", "\uf8ff",
    "\x00", "a\x00b", "\x01\x02", "\x04\x06\x13\x14\x16\x1d", "\x1b[31mred\x1b[0m", "\x7f", "\x0b\x0c a", "\U000e0001", "\U0010ffff", "\U000f0000 a",
    "\U0001f600", "\U0001f600\U0001f601", " \U0001f600 a", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7", "\U0001f44d\U0001f3fd", "\u2764\ufe0f", "1\ufe0f\u20e3", "a\U0001f600b\U0001f6001",
    "<|im_end|>", "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "</s>", "<s>", "<0x0A>", "a<|endoftext|>b", "<repo_name>", "<|", "|>", "\u2581", "\u2581a", "\u0120a", "\u010a",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", " " * 40, "=" * 70, "-" * 33 + "\n", "ab" * 40, "\u4e2d" * 20, "ha " * 20, "\n" * 17, "\t" * 9 + "x",
    "Lopadotemachoselachogaleokranioleipsanodrimhypotrimmatosilphio", "antidisestablishmentarianism", "CamelCaseWordsAndSNAKE_CASE_words", "a_b_c __init__ --flag=1",
]


def scripts(seed=1):
    """Two texts for each script that Python's Unicode names know: letters, marks, numbers and signs of its own, between spaces and commas."""
    groups = {}
    for c in range(0x80, 0x110000):
        category = unicodedata.category(chr(c))
        if category[0] not in "LMNPS":
            continue
        words = unicodedata.name(chr(c), "").replace("-", " ").split()
        if not words:
            continue
        key = "OLD " + words[1] if words[0] == "OLD" and len(words) > 1 else words[0]
        groups.setdefault(key, []).append(chr(c))
    r = random.Random(seed)
    out = []
    for key in sorted(groups):
        letters = [c for c in groups[key] if unicodedata.category(c)[0] in "LM"]
        if len(letters) < 15:
            continue
        others = [c for c in groups[key] if unicodedata.category(c)[0] not in "LM"] or list(".,1")
        for _ in range(2):
            words = ["".join(r.choice(letters) for _ in range(r.randint(1, 5))) for _ in range(r.randint(2, 3))]
            out.append(r.choice([" ", "  ", ", ", "\n"]).join(words) + r.choice(["", " ", "-"]) + "".join(r.choice(others) for _ in range(r.randint(1, 2))))
    return out


def mixtures(seed=2, count=60):
    """Parts of all the above, glued together without regard to sense."""
    r = random.Random(seed)
    pool = PHRASES + CODE + EDGES
    out = []
    for _ in range(count):
        parts = []
        for _ in range(r.randint(2, 4)):
            s = r.choice(pool)
            start = r.randrange(len(s) + 1)
            parts.append(s[start:start + r.randint(1, 20)])
        out.append(r.choice(["", " ", "  ", "\n", "'", "1"]).join(parts))
    return out


def all_texts():
    return list(dict.fromkeys(PHRASES + CODE + EDGES + scripts() + mixtures()))


if __name__ == "__main__":
    texts = all_texts()
    print(len(texts), sum(len(t.encode()) for t in texts), len(scripts()))
