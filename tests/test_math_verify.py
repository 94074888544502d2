"""What `math_verify_reward` makes of answers from the wild, by kinds: (truth, response, reward); and MATH itself."""

import random
import re

import pytest
from test_verifiers import SHARED, boxed, wrong

from prerl_lightning.rewards import NumericReward, gsm8k_reward
from prerl_lightning.rewards.reading import number
from prerl_lightning.rewards.symbolic import _parse, math_verify_reward, verify

# minerva's kind of truths, and what people write for them
SCIENTIFIC = (
    "1.6e-19 3e6 6.6e-34 2e-2 4.5e33 7.353e14 1e11 9e11 1.4903e4 1E-8 2.75e+11 -3.2e-5 5e0 1e-34 6.5e-2 3.83e35"
)


@pytest.mark.parametrize("truth", SCIENTIFIC.split())
def test_truths_with_an_exponent_can_be_earned(truth):
    mantissa, _, exponent = truth.lower().partition("e")
    e = int(exponent)
    right = [
        truth,
        f"{mantissa} \\times 10^{{{e}}}",
        f"{mantissa}\\cdot10^{{{e}}}",
        f"{mantissa} \u00d7 10^{e}",
        f"x = {mantissa} \\times 10^{{{e}}}",
        f"{mantissa} \\times 10^{{{e}}} \\text{{ J}}",
        f"{mantissa}\\mathrm{{e}}{{{e}}}",
        truth.replace("-", "\u2212"),
        f"{number(truth).value.numerator}/{number(truth).value.denominator}",
    ]
    other = "7" + mantissa.lstrip("-")
    other_values = [
        f"{other} \\times 10^{{{e}}}",
        f"{mantissa} \\times 10^{{{e - 1}}}",
        f"e{e}",
        f"{mantissa}e",
        "0.000001",
    ]
    cases = boxed(*((truth, a, 1) for a in right), *((truth, a, 0) for a in other_values))
    cases += [(truth, f"The answer is {truth}.", 1), (truth, f"The answer is {mantissa}.", int(e == 0))]
    assert wrong(math_verify_reward, cases) == []
    assert wrong(NumericReward(), boxed(*((truth, a, 1) for a in right))) == []
    assert wrong(NumericReward(), boxed(*((truth, a, 0) for a in (*other_values, "0")))) == []


def test_eulers_number_is_still_one():
    assert (
        wrong(math_verify_reward, boxed(("e^2", "e^{2}", 1), ("2e", "2e", 1), ("e - 5", "-5+e", 1), ("2e", "200", 0)))
        == []
    )


MATH_BOXES = [
    ("42", "I must put it in \\boxed {} at the end. $6\\cdot 7=\\boxed{42}$", 1),
    ("42", "It goes into \\boxed{...}: $\\boxed{42}$", 1),
    ("42", "As asked, \\boxed{answer} comes last.\n$$\\boxed{42}$$", 1),
    ("42", "\\boxed{42} (in the \\boxed{} form)", 1),
    ("42", "\\boxed{42}. I used \\boxed for the answer.", 1),
    ("42", "\\boxed\n {42}", 1),
    ("42", "\\fbox{42}", 1),
    ("42", "$\\boxed 42$", 1),
    ("42", "\\boxed{\\boxed{42}}", 1),
    ("42", "\\boxed{n = \\boxed{42}}", 1),
    ("42", "It is 42: \\boxed{}", 0),
    ("42", "It is 42: \\boxed{42", 0),
    ("41", "First \\boxed{41}, but no: \\boxed{42", 0),
    ("41", "First \\boxed{41}. Wait, it is \\boxed{42}.", 0),
    ("42", "First \\boxed{41}. Wait, it is \\boxed{42}.", 1),
    ("42", "$\\boxed{42}$, and again: $\\boxed{42}$", 1),
    ("42", "<think>maybe \\boxed{41}</think>The answer is $42$.", 1),
    ("42", "<think>maybe \\boxed{42}</think>The answer is $41$.", 0),
    ("42", "<think>so \\boxed{42}</think>", 1),
    ("3, 5, 7", "$\\boxed{3}, \\boxed{5}, \\boxed{7}$", 1),
    ("3, 5, 7", "\\[\\boxed{7} \\quad \\text{and} \\quad \\boxed{3},\\ \\boxed{5}\\]", 1),
    ("3, 5, 7", "\\boxed{3}, \\boxed{5}", 0),
    ("7", "$\\boxed{3}, \\boxed{5}, \\boxed{7}$", 0),
    ("7", "$\\boxed{3}$ or $\\boxed{7}$", 0),
    ("7", "x = \\boxed{3} or x = \\boxed{7}", 0),
    ("3,7", "x = \\boxed{3} or x = \\boxed{7}", 1),
    ("3\\text{ or }7", "\\boxed{3} or \\boxed{7}", 1),
    ("28\\%", "$\\boxed{28}$ percent", 1),
    ("0.28", "$\\boxed{28}\\%$", 1),
    ("10455", "\\boxed{200} and then \\boxed{255}. The final answer is $10,455$. I hope it is correct.", 1),
]

MATH_SPELLING = boxed(
    *(
        ("42", a, 1)
        for a in ("42.", "42,", "42 .", "42 \\,", "$42$", "$42.$", "**42**", "`42`", "~42", "\\(42\\)", "42\\ ")
    ),
    *((t, t + ".", 1) for t in ("\\frac{3}{4}", "x^2+1", "(1,2)", "\\sqrt{2}", "\\text{east}", "[0,1)", "5!", "\\pi")),
    *(
        (t, a, 1)
        for t, a in (("-3", "\u22123"), ("-3", "\u20133"), ("-\\sqrt{2}", "\u2212\\sqrt{2}"), ("x-1", "x \u2212 1"))
    ),
    ("90", "90°", 1),
    ("2\\pi", "2π", 1),
    ("6x", "2·3·x", 1),
    ("1,2,3", "1, 2, 3, ...", 0),
    *(("10000", a, 1) for a in ("10,000", "10{,}000", "10\\,000", "10 000", "10,\\!000", "10~000", "10000.0")),
    *((t, "1 2", 0) for t in ("12", "3", "2", "1")),
    *((t, "1\\,2", 0) for t in ("12", "2", "1")),
    ("123456", "123 45 6", 0),
    ("5/2", "2 1/2", 1),
    ("3/2", "2 1/2", 0),
    ("\\frac{5}{2}", "2\\frac{1}{2}", 1),
    ("2.75", "2,75", 1),
    ("1,22", "1.22", 0),  # two values
    ("2.75", "2{,}75", 1),
    ("1.234", "1,234", 0),
    ("1234", "1.234", 0),
    ("2,5", "5,2", 1),
    ("204_5", "204_5", 1),
    ("204_5", "204_{5}", 1),
    ("204_5", "(204)_{5}", 1),
    ("204_5", "204_6", 0),
    ("204_{12}", "204_{11}", 0),
    ("BAD_{16}", "BAD_{12}", 0),
)

MATH_VALUES = boxed(
    ("3\\text{ or }7", "3", 0),
    ("3\\text{ or }7", "7, 3", 1),
    ("5\\text{ and }8", "5", 0),
    ("5", "5\\text{ (or 6)}", 0),
    ("42", "42\\text{ apples and 3 pears}", 0),
    ("42", "42\\text{ apples}", 1),
    ("2004!", "2004!+1", 0),
    ("\\frac{100!}{98!}", "9900", 1),
    ("x=6", "2x=6", 0),
    ("6", "2x=6", 0),
    ("6", "x=6", 1),
    ("x=6", "6", 1),
    ("y=6", "x=6", 0),
    ("y=x+1", "2y=x+1", 0),
    ("y=x+1", "2y=2x+2", 1),
    ("42", "x+y=42", 0),
    ("4", "x^2=4", 0),
    ("42", "f(2)=42", 1),
    ("42", "a_1 = 42", 1),
    ("42", "AB=42", 1),
    ("42", "6\\cdot7=42", 1),
    ("42", "x \\ge 42", 0),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}", 0),
    ("\\frac{1}{2004!}", "\\frac{1}{2004!}", 1),
    ("\\frac{1}{100!}", "\\frac{1}{99! \\cdot 100}", 1),
    ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}", 0),
    ("10^{-20}", "0", 0),
    ("20!", "2432902008176640000", 1),
    ("20!", "2432902008176640001", 0),
    ("2^{64}", "18446744073709551616", 1),
    ("2^{64}", "18446744073709551615", 0),
    ("0.001234", "0.0012344", 0),
    ("\\frac{1}{1200}", "0.000833", 0),
    ("\\frac{1}{3}", "0.333333", 1),
    ("\\frac{1}{3}", "0.33333", 0),
    ("\\frac{1}{3}", "33.3\\%", 0),
)

REPEATING = boxed(
    *(
        (t, a, 1)
        for one in (
            "0.\\overline{3}",
            "0.\\dot{3}",
            "0.\\bar3",
            ".\\overline 3",
            "0.3\\overline{33}",
            "x = 0.\\overline{3}",
        )
        for t, a in (("1/3", one), (one, "\\frac13"), (one, "0.\\overline{3}"))
    ),
    ("\\frac17", "0.\\overline{142857}", 1),
    ("\\frac17", "0.\\dot{1}4285\\dot{7}", 1),
    ("-\\frac16", "-0.1\\overline{6}", 1),
    ("\\frac73", "2.\\overline{3}", 1),
    ("1", "0.\\overline{9}", 1),
    ("\\frac13", "33.\\overline{3}\\%", 1),
    ("x+\\frac13", "0.\\overline{3}+x", 1),
    *(("0.\\overline{3}", a, 0) for a in ("0.3", "0.33", "3", "0", "0.\\overline{6}", "0.0\\overline{3}")),
    ("\\frac16", "0.\\overline{16}", 0),
)

UNITS = (
    "12 cm^2",
    "12\\,m^2",
    "12 m^{3}",
    "12cm²",
    "A = 12 in^2",
    "12 m/s^2",
    "12\\text{ cm}^2",
    "12\\,\\mathrm{m}^{3}",
)
MATH_UNITS = boxed(
    *((t, a, right) for u in UNITS for n, right in (("12", 1), ("144", 0), ("13", 0)) for t, a in ((n, u), (u, n))),
    *((t, a, 1) for t in UNITS for a in UNITS),
    ("12\\pi", "12\\pi cm^2", 1),
    ("12", "12\\pi cm^2", 0),
    ("\\frac34", "\\frac{3}{4} ft^2", 1),
    # a letter may be a variable
    *((t, a, 0) for t, a in (("12m^2", "12"), ("12 x^2", "12"), ("12", "12 x^2"), ("12x", "12 m^2"), ("x m^2", "x"))),
    ("12m^2", "12 m^2", 1),
    ("12m^3", "12 m^2", 0),
    ("12", "12 cm^2 or 13 cm^2", 0),
    ("12", "x+12 m^2", 0),
)

BASED = (
    "1011_2",
    "1011_{(2)}",
    "1011_\\text{two}",
    "(1011)_{\\mathrm{two}}",
    "1011 in base 2",
    "1011\\text{ (base two)}",
)
OTHERS = ("1011_3", "1011 in base three", "1010_{\\text{two}}", "11", "1011")
MATH_BASES = boxed(
    *((t, a, 1) for t in (*BASED, "n = 1011_{2}") for a in BASED),
    *((t, a, 0) for t in (*BASED, "n = 1011_{2}") for a in OTHERS),
    ("204_6", "204_{6}", 1),
    ("204_{6}", "204_6", 1),
    ("204_6", "204_7", 0),
    ("204_{\\text{six}}", "204 in base seven", 0),
    ("1A_{16}", "1A\\text{ base sixteen}", 1),
)

# read as a whole or not at all
MATH_BOUNDS = boxed(
    *(
        ("42", a, 0)
        for sign in (
            "\\ge ",
            "\\geq ",
            "\\ge",
            "\\ne ",
            "\\neq ",
            "> ",
            "<",
            "≥",
            "≠",
            "\\not= ",
            "\\text{not }",
            "not ",
        )
        for a in (f"{sign}42", f"x {sign}42")
    ),
    *(("42", a, 0) for a in ("\\text{at least }42", "42\\text{ at least}", "42\\text{ or more}", "42+", "!= 42")),
    *(
        ("3", a, 0)
        for a in ("\\le 3", "\\lt 3", "4 \\to 3", "1\\lor 3", "5\\mid 3", "5\\Rightarrow 3", "3 (or 7)", "3 or 7")
    ),
    *(
        (point, a.replace("P", point), 0)
        for point in ("(\\frac54,\\frac74)", "\\left(\\frac{5}{4},\\frac{7}{4}\\right)")
        for a in ("P+1", "P^2", "3P", "\\frac{7}{4}")
    ),
    *((t, t, 1) for t in ("\\ge 42", "x>5", "4 \\to 3", "5\\text{ or more}")),
    ("\\ge 42", "42", 0),
    ("5\\text{ or more}", "5 \\text{ or more}", 1),
    # whose names the library cannot read
    *(
        ("25", f"{n} = 25", 1)
        for n in ("\\max", "\\sum", "[ABC]", "\\overline{AB}", "P(A\\cap B)", "\\sigma", "\\Pr(A)")
    ),
    *(
        ("25", a, 0)
        for a in ("2\\max = 25", "\\max f + 1 = 25", "x \\ne y, \\max = 25", "\\max = 4 \\text{ or } \\min = 25")
    ),
)

MATH_AMOUNTS = boxed(
    *(
        (t, a, 0)
        for t in ("3", "5", "8", "15", "30")
        for a in (
            *("5 \\text{ cm or } 3 \\text{ cm}", "5 \\text{ (or } 3 \\text{)}", "5\\text{ cm}, 3\\text{ cm}"),
            *(
                "5\\text{ feet }3\\text{ inches}",
                "5\\mathrm{ ft }3\\mathrm{ in}",
                "5\\text{ apples and }3\\text{ pears}",
            ),
            *("5\\text{ hours }30\\text{ minutes}", "5\\text{ out of 7}", "3\\text{ square roots of 2}"),
        )
    ),
    *(
        ("5\\text{ feet }3\\text{ inches}", f"{a}\\text{{ feet }}{b}\\text{{ inches}}", a == 5)
        for a, b in ((5, 3), (3, 5))
    ),
    ("3,5", "5\\text{ cm}, 3\\text{ cm}", 1),
    ("3,7", "3\\text{ and }7\\text{ cm}", 1),
    ("25", "25\\text{ m}/\\text{s}", 1),
    ("25", "25\\,\\text{m}\\cdot\\text{s}^{-1}", 1),
    *(
        ("3", f"3{a}", 0)
        for a in ("\\text{ million}", "\\text{ thousand}", "\\text{ dozen}", " million", " dozen", " hundred")
    ),
    *(
        ("3000000", f"3{a}", 1)
        for a in ("\\text{ million}", " million", "~\\text{million}", "\\text{ million dollars}")
    ),
    ("3\\text{ million}", "3000000", 1),
    ("1.5e6", "1.5\\text{ million}", 1),
    ("36", "3\\text{ dozen}", 1),
    ("1,5", "1.5", 0),
    ("3,4", "3.4", 0),
    ("10,12", "10.12", 0),
    ("10.12", "10,12", 1),
)

MATH_DRESS = boxed(
    *(
        ("25", a, 1)
        for a in (
            *(
                "\\text{25}",
                "\\mathbf{25}",
                "\\boldsymbol{25}",
                "\\underline{25}",
                "\\color{red}{25}",
                "{\\color{red} 25}",
            ),
            *(
                "\\textcolor{blue}{25}",
                "\\bf 25",
                "\\text{25 cm}",
                "\\large 25",
                "\\pounds 25",
                "Rs. 25",
                "25\\text{ (mod 30)}",
                "25 dollars",
                "25 points",
                "\\$25",
                "€25",
                "£25",
                "25€",
            ),
            *(
                "\\approx25",
                "≈25",
                "x \\approx 25",
                "\\text{about }25",
                "about 25",
                "\\text{approximately } 25",
                "25 \\\\",
            ),
            *(
                "\\text{Total: }25",
                "\\text{The answer is }25",
                "The answer is 25",
                "Answer: 25",
                "x is 25",
                "There are 25",
            ),
        )
    ),
    *(("25", a, 0) for a in ("{-}25", "\\text{not }25", "The answer is not 25", "\\text{-25}", "\\text{24 or 25}")),
    ("-25", "{-}25", 1),
    ("-25", "{+}25", 0),
    *(("2\\sqrt3", a, 1) for a in ("2√3", "2√{3}", "√12")),
    ("\\sqrt3", "√3", 1),
    ("486", "2·3⁵", 1),
    ("x^{12}", "x¹²", 1),
    *(
        (t, a, 1)
        for t in ("\\emptyset", "\\varnothing", "\\{\\}")
        for a in ("\\emptyset", "\\varnothing", "\\{\\}", "∅")
    ),
    ("\\text{June 20}", "June 20", 1),
    ("June 20", "\\text{June 20}", 1),
    ("\\text{June 20}", "June 21", 0),
    ("{May}", "\\text{May}", 1),
    ("\\text{on}", "\\text{no}", 0),
    ("\\text{13 and 7}", "13, 7", 1),
    ("-12{or}-30", "-30, -12", 1),  # so in verl's copy of MATH
    ("\\frac{2469}{20,000}", "\\frac{2469}{20000}", 1),
    ("\\frac13", "\\frac{100}{3}\\%", 1),
    # the side of the wanted one's kind
    *(("\\frac23", a, 1) for a in ("\\frac23 \\approx 0.667", "x = \\frac{2}{3} ≈ 0.67")),
    *(("0.667", a, 1) for a in ("\\frac23 \\approx 0.667", "\\frac{hc}{\\lambda} \\approx 0.667")),
    *(
        (t, a, 0)
        for t, a in (
            ("5", "5 \\approx 7.3"),
            ("7.3", "5 \\approx 7.3"),
            ("7", "5 \\approx 7"),
            ("0.667", "\\frac23 \\approx 0.6"),
        )
    ),
    ("\\frac{2}{3}\\approx0.67", "\\frac23", 1),
    ("\\approx8.24", "8.24", 1),
)

# as they stand in verl's copy of MATH, and as they are
COLLAPSED = "\\begin{pmatrix}\\frac{18}{5}\\-\\frac{9}{5}\\end{pmatrix}"
ROTATION = "\\begin{pmatrix}-1/2&-\\sqrt{3}/2\\sqrt{3}/2&-1/2\\end{pmatrix}"
TWO_FRACTIONS = "\\begin{pmatrix}\\frac{3}{5}&\\frac{1}{5}\\frac{3}{5}&\\frac{1}{5}\\end{pmatrix}"
PHANTOM = "\\begin{pmatrix}1&-1\\1&\\phantom-1\\end{pmatrix}"
MATH_MATRICES = boxed(
    *(
        (COLLAPSED, f"\\begin{{{m}}}{a}\\end{{{m}}}", 1)
        for m in ("pmatrix", "bmatrix")
        for a in (
            "\\frac{18}{5}\\\\-\\frac{9}{5}",
            "\\dfrac{18}{5} \\\\ -\\dfrac{9}{5}",
            "18/5 \\\\ -9/5",
            "3.6\\\\ -1.8",
        )
    ),
    *(
        (COLLAPSED, a, 0)
        for a in (
            "-\\frac95",
            "-\\frac{9}{5}",
            "\\begin{pmatrix}\\frac{18}{5} & -\\frac{9}{5}\\end{pmatrix}",
            "\\begin{pmatrix} 18/5 \\\\ 9/5 \\end{pmatrix}",
        )
    ),
    (
        ROTATION,
        "\\begin{pmatrix} -\\frac{1}{2} & -\\frac{\\sqrt3}{2} \\\\ \\frac{\\sqrt{3}}{2} & -\\frac12 \\end{pmatrix}",
        1,
    ),
    (TWO_FRACTIONS, "\\begin{pmatrix}\\frac{3}{5}&\\frac{1}{5}\\\\ \\frac{3}{5}&\\frac{1}{5}\\end{pmatrix}", 1),
    (TWO_FRACTIONS, "\\frac15", 0),
    (PHANTOM, "\\begin{pmatrix}1&-1\\\\1&1\\end{pmatrix}", 1),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}", 1),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", 0),
)

MATH_UNBOXED = [
    *(
        (t, a, 1)
        for t in ("B", "\\text{(B)}", "{(B)},")
        for a in ("The answer is (B).", "The answer is $B$.", "**Answer: B**")
    ),
    *(("B", a, 0) for a in ("The answer is (A).", "The answer is A or B.", "The answer is (B) or (C).")),
    ("12 cm^2", "The answer is 12.", 1),
    ("12 cm^2", "The answer is 144.", 0),
    ("1/3", "The answer is $0.\\overline{3}$.", 1),
    ("34", "**Answer:** 34", 1),
    ("34", "The answer is $34$. " + "And so on without a number. " * 200, 1),
    ("34", "Final Answer: The largest $n$ is 34." + " Thanks for reading." * 100, 1),
    ("1000.99", "The answer is 1000,99", 1),
    ("A", "I have no idea, A friend told me", 0),
    ("A", "The answer is A.", 1),
    ("1.6e-19", "The answer is 1.6e-19 C.", 1),
    ("35", "The answer is 34. " + "x" * 3000, 0),
]

MATH_TRUTHS = [
    (truth, "\\boxed{42}", 1)
    for truth in (
        "$42$",
        "\\(42\\)",
        "$42$ miles",
        "\\boxed{42}",
        "The answer is $42$.",
        "So $6\\cdot7=\\boxed{42}$.",
        "42.",
        " 42 ",
    )
]


KINDS = "BOXES SPELLING VALUES UNITS BASES BOUNDS AMOUNTS DRESS MATRICES UNBOXED TRUTHS"


@pytest.mark.parametrize("kind", KINDS.split())
def test_math_verify(kind):
    assert wrong(math_verify_reward, globals()[f"MATH_{kind}"]) == []


def test_repeating_decimals():
    assert wrong(math_verify_reward, REPEATING) == []
    # with an expression to work out, or a percent sign that is not looked at
    numbers = [case for case in REPEATING if not re.search(r"x\+|%", case[0] + case[1])]
    assert wrong(NumericReward(), numbers) == []
    assert wrong(gsm8k_reward, [("0.75", "#### 0.7\\overline{49}", 0), ("1/6", "so x = 0.1\\overline{6}", 1)]) == []


def test_wrong_answers_are_pooled_by_value():
    def name(answer, truth="\\frac{1}{3}"):
        return math_verify_reward("", f"\\boxed{{{answer}}}", truth, {}).answer

    for alike in (
        (
            "0.25",
            "1/4",
            "\\frac{1}{4}",
            "\\frac14",
            "\\frac{2}{8}",
            ".25",
            "0.250",
            "x = \\frac14",
            "\\sqrt{\\frac{1}{16}}",
        ),
        ("12", "12.0", "12.", "3\\cdot4", "n = 12", "\\sqrt{144}"),
        ("1,2", "2,1", "\\{1, 2\\}"),
        ("x+1", "1+x"),
        ("1e-7", "10^{-7}"),
    ):
        assert len({name(a) for a in alike}) == 1, alike
    for different in (
        ("0.25", "0.26"),
        ("x+1", "x+2"),
        ("1e-7", "2e-7"),
        ("1,2", "12"),
        ("(1,2)", "(2,1)"),
        ("10^{15}", "10^{15}+1"),
    ):
        assert len({name(a) for a in different}) == 2, different
    assert {name(a) for a in ("\\frac13", "0.333333", "\\frac{2}{6}")} == {"\\frac{1}{3}"}
    numeric = NumericReward()
    assert {numeric("", f"\\boxed{{{a}}}", "1", {}).answer for a in ("0.25", "1/4", "\\frac14", "2.5e-1")} == {"0.25"}
    assert {numeric("", f"\\boxed{{{a}}}", "3", {}).answer for a in ("3", "3.0001", "6/2")} == {"3"}


# true and false equalities, spelled so that strings mislead
PAIRS = [
    *(
        "12|1 2",
        "12|1\\ 2",
        "3|1 2",
        "x=6|2x=6",
        "6|3=6",
        "5|\\text{ }5",
        "10|1\\text{ }0",
        "5\\text{ a}|5\\text{ b}",
        "5\\text{ a}|5",
    ),
    *(
        "50\\%|50",
        "50|0.50",
        "0.5|\\frac{1}{2}",
        "\\frac{1}{2}|\\frac12",
        "\\frac{11}{2}|\\frac112",
        "\\sqrt{3}4|\\sqrt34",
        "2^{10}|2^10",
    ),
    *(
        "(1,2)|[1,2]",
        "(1,2)|(2,1)",
        "(1,2)|1,2",
        "1,2|12",
        "1,2|1.2",
        "x|X",
        "ab|ba",
        "-x|x",
        "--3|3",
        "0.1|.1",
        "1.0|1",
        "01|1",
        "1|l",
    ),
    *(
        "\\pi|3.14159",
        "\\pi|3.141593",
        "e|2.718282",
        "\\frac{1}{3}|0.333333",
        "\\frac{1}{3}|0.3333333",
        "100!|100",
        "\\infty|-\\infty",
    ),
    *(
        "x^2|2x",
        "x^{2}|x^2",
        "a_1|a1",
        "\\text{(A)}|A",
        "12:30|0.4",
        "3:4|\\frac{3}{4}",
        "\\pm 3|3",
        "3,-3|\\pm3",
        "1e5|100000",
        "5^\\circ|5",
    ),
]


def bare(truth, answer):
    return verify(_parse(f"\\boxed{{{truth}}}"), _parse(f"\\boxed{{{answer}}}"), timeout_seconds=None)


def test_what_is_right_without_the_library_is_right_with_it():
    pairs = [pair.split("|") for pair in PAIRS]
    pairs += [(b, a) for a, b in pairs]
    false = [(t, a) for t, a in pairs if math_verify_reward("", f"\\boxed{{{a}}}", t, {}) == 1 and not bare(t, a)]
    # an exponent that is one; a decimal comma
    assert set(false) == {("1e5", "100000"), ("100000", "1e5"), ("1.2", "1,2")}


def truths_of_math():
    path = SHARED / "data" / "math_train.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path, columns=["reward_model"])["reward_model"].to_pylist()
    return sorted({row["ground_truth"] for row in rows if row["ground_truth"].strip()})


def false_positives(truths, pairs, seed=0):
    """Of pairs of different truths, half of them near in length and letters."""
    rng = random.Random(seed)
    truths = rng.sample(truths, len(truths))
    near = sorted(truths, key=lambda t: (sorted(t), t))
    chosen = [
        rng.choice(((rng.choice(truths), rng.choice(truths)), near[(i := rng.randrange(len(near) - 1)) : i + 2]))
        for _ in range(pairs)
    ]
    return [
        (t, a) for t, a in chosen if t != a and math_verify_reward("", f"\\boxed{{{a}}}", t, {}) == 1 and not bare(t, a)
    ]


def test_no_pair_of_maths_truths_is_equal_by_our_doing():
    assert false_positives(truths_of_math(), 150) == []


@pytest.mark.slow
def test_no_pair_of_maths_truths_is_equal_by_our_doing_at_length():
    assert false_positives(truths_of_math(), 12_500) == []


def test_maths_truths_earn_themselves_with_a_period():
    truths = random.Random(0).sample(truths_of_math(), 300)
    assert (
        wrong(
            math_verify_reward, boxed(*((t, t + end, 1) for t, end in zip(truths, (".", ",", " .") * 100, strict=True)))
        )
        == []
    )
