"""Pairs of a reference and a completion that each stand for a whole form of answers. Text of our own."""


def boxed(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return [(gold, rf"\boxed{{{answer}}}") for gold, answer in pairs]


RIGHT = {
    "mixed numbers before symbols": boxed((r"8\frac13\pi", r"\frac{25\pi}{3}"), (r"\frac{3}{2}x", r"1\frac12 x")),
    "bases": boxed(
        ("AB_{16}", "(AB)_{16}"), ("FF_{16}", "255"), ("52_8", "52"), ("1011_2", r"1011 \text{ (binary)}"), ("221_3", "25_{10}")
    ),
    "points and vectors": boxed(
        ("(2,-3)", "A(2,-3)"),
        (r"\begin{pmatrix} 3 \\ -4 \end{pmatrix}", r"\binom{3}{-4}"),
        (r"(\pm1,1)", "(1,1),(-1,1)"),
        ("(1000,2)", "(1{,}000,2)"),
        (r"\{(1,2)\}", "(1,2)"),
        ("A(1,0), B(0,1)", "(1,0),(0,1)"),
    ),
    "measures": boxed(
        ("1 hour 20 minutes", "1 hour and 20 minutes"),
        ("1 hour 20 minutes", r"80 \text{ minutes}"),
        ("2 ft 6 in", r"2.5\text{ ft}"),
        (r"8\text{ m/s}", r"28.8 \text{ km/h}"),
        (r"100\text{ cm}^{2}", r"0.01\text{ m}^2"),
        (r"\$2 \text{ million}", r"\$2{,}000{,}000"),
        (r"30\text{ mph}", r"30\text{ miles/hour}"),
        (r"4.2\text{ L}", r"4200\text{ mL}"),
        ("9.8", r"9.8 \frac{\text{m}}{\text{s}^2}"),
    ),
    "degrees and radians": boxed(
        (r"30^\circ", r"\frac{\pi}{6}"), (r"\frac{\pi}{3}", r"60^\circ"), (r"22.5^\circ", r"22^\circ 30'")
    ),
    "decimals that go on": boxed(
        (r"\frac{3}{11}", r"0.272727\ldots"), ("0.333...", "1/3"), (r"\frac{1}{3}", r"\frac{1}{3} = 0.333")
    ),
    "intervals": boxed(
        ("(0,5)", "]0,5["),
        ("-2<x<2", "|x|<2"),
        (r"(-\infty,-3]\cup[3,\infty)", r"|x|\ge 3"),
        (r"(e,\infty)", "x>e"),
        (r"(-\infty,0)\cup(0,\infty)", r"x \ne 0"),
        (r"x\ge 4", r"4\le x<\infty"),
        (r"(-\infty,4)\cup(4,\infty)", r"\mathbb{R}-\{4\}"),
    ),
    "equations": boxed(
        (r"f^{-1}(x)=\frac{x-1}{2}", r"\frac{x-1}{2}"),
        (r"y = \frac{3}{x}", "xy=3"),
        ("v(t)=3t^2", "v=3t^2"),
        (r"2k\pi+\frac{\pi}{6}, k\in\mathbb{Z}", r"\frac{\pi}{6}+2k\pi"),
    ),
    "towers of powers": boxed(("2^{2^{x}}", "2^{(2^x)}"), (r"e^{-\frac{x^2}{2}}", "e^{-x^2/2}")),
    "roots of what is negative": boxed((r"\sqrt[3]{-8}", "-2"), (r"-\sqrt[3]{5}", r"\sqrt[3]{-5}")),
    "phrases": boxed(
        (r"\text{no solution}", r"\emptyset"),
        (r"\text{does not exist}", r"\text{DNE}"),
        (r"\text{ellipse}", r"\text{an ellipse}"),
        (r"\mathbb{R}", r"\text{all real numbers}"),
        ("11", r"\text{exactly } 11"),
        ("24", r"\text{Total: 24}"),
    ),
    "a choice with its text": [
        ("(B) 12", r"\boxed{B}"),
        ("(B) 12", r"\boxed{\textbf{(B)}\ 12}"),
        ("(B) 12", r"\boxed{12}"),
        (r"\textbf{(D)}\ 4", "The answer is D."),
    ],
    "derivations in rows": [
        ("8", "\\begin{align*}\n2x&=16\\\\\nx&=8.\n\\end{align*}"),
        ("6", r"\begin{gather*} x+1=7 \\ x=6 \end{gather*}"),
        ("8", r"\begin{eqnarray*} x &=& 8 \end{eqnarray*}"),
    ],
    "products of letters": boxed(("xyz", "zyx")),
    "sentences": [
        ("37", "Therefore, the maximum value is 37, attained at $x=2$."),
        ("0.75", "Each slice costs 75 cents."),
        ("104", "=> 104"),
        ("(2,3)", "The point is (2, 3)."),
        (r"2\pi", "The circumference is 2π."),
        ("x^2-4", "The product is x^2 - 4."),
        ("70,000", "The profit is 70 000 dollars."),
        ("1600", r"So her total is **\$1,600**."),
        ("30", "Answer: **30** students"),
        ("64", "So the remainder is $64$ when divided by 100."),
        ("64", "Thus the area is $8^2 = 64$ cm$^2$."),
        ("10", "5+5=<<5+5=10>>10"),
        ("-2, 3", "The solutions are -2 and 3."),
        (r"\frac{3}{4}", r"The answer is $\dfrac{3}{4}$ (or 0.75)."),
        ("45", "#### x = 45"),
    ],
}

WRONG = {
    "words that are no unit": boxed(
        ("17", r"17 \text{ is wrong}"),
        ("17", r"17 \text{ (no)}"),
        ("12", r"12\text{35}"),
        ("12", "12 vs 35"),
        ("5", r"5 \text{ squared}"),
        ("37", r"37\text{x}"),
        ("37", r"37 \text{ or more}"),
    ),
    "bases": boxed(("AB_{16}", "(BA)_{16}"), ("52_8", "52_9"), ("52", "52_8"), ("1101_2", "1101_{10}")),
    "points and vectors": boxed(
        ("(2,-3)", "A(-3,2)"),
        (r"\begin{pmatrix} 3 \\ -4 \end{pmatrix}", r"\binom{-4}{3}"),
        (r"(\pm1,1)", "(1,1)"),
        (r"\{1,2,3\}", "(1,2,3)"),
    ),
    "measures": boxed(
        ("1 hour 20 minutes", "1 hour and 30 minutes"),
        (r"8\text{ m/s}", r"8\text{ m/s}^2"),
        (r"26 \text{ km/h}", r"26 \text{ m/s}"),
        (r"12\text{ cm}^2", r"12\text{ m}^2"),
        (r"\$5", r"5 \text{ cents}"),
        (r"\$4.5 \text{ million}", r"4.5\text{ billion}"),
    ),
    "degrees and radians": boxed((r"\frac{\pi}{5}", "36"), (r"36^\circ", r"\frac{\pi}{6}"), (r"22.5^\circ", r"22^\circ 50'")),
    "mixed numbers": boxed((r"7\frac{2}{3}\pi", r"\frac{14}{3}\pi"), ("18", "18 and a half")),
    "equations": boxed((r"y = \frac{3}{x}", "xy=-3"), ("2^{2^{x}}", "(2^2)^x"), ("-2<x<2", "|x|>2")),
    "a choice with its text": boxed(("(B) 12", "C"), ("(B) 12", "(C) 12"), ("(B) 12", "13"), ("(B) 12", "(B) 13")),
    "sentences that say otherwise": [
        ("37", "The answer is 37 more than 5."),
        ("42", "The answer is at most 42."),
        ("42", "I think the answer isn't 42."),
        ("42", "The answer can't be 42."),
        ("42", "So 42 is wrong."),
        ("42", "The area is 42π."),
        ("18", "The answer is 18 and a half."),
        ("5", "the answer is 5 apples and 2 pears"),
    ],
}
