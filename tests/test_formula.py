# SPDX-License-Identifier: Apache-2.0
"""The formula machine against Python's own grammar, the solver against brute force."""

import ast
import itertools
import random
import time
from fractions import Fraction
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_trl.envs.gym_cards import formula
from vlmq_trl.envs.gym_cards.formula import evaluate_formula, solve

TOKENS = [*map(str, range(1, 11)), "+", "-", "*", "/", "(", ")"]


def reference(entries):
    """The value by Python's parser and exact rationals; None where it is not a plain formula of binary operators."""

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.Div):
                return left / right
        raise SyntaxError("not a plain formula")

    try:
        return value(ast.parse(" ".join(entries), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5 + 7", 12),
        ("1 + 2 * 3", 7),
        ("( 1 + 2 ) * 3", 9),
        ("8 - 3 - 2", 3),
        ("8 / 4 / 2", 1),
        ("8 / ( 3 - 8 / 3 )", 24),
        ("1 / 3 + 1 / 6", Fraction(1, 2)),
        ("( ( 5 ) )", 5),
        ("10 * 10 / 10", 10),
        ("1 / ( 2 - 2 )", None),
        ("", None),
        ("+", None),
        ("- 5", None),
        ("5 +", None),
        ("5 5", None),
        ("( )", None),
        ("( 5", None),
        ("5 )", None),
        ("5 ( 5 )", None),
        ("2 * * 3", None),
        ("5 =", None),
        ("_", None),
        ("٣", None),
        ("9" * 5000, None),
    ],
)
def test_values_by_hand(text, value):
    assert evaluate_formula(text.split()) == value


def test_a_deep_formula_does_not_exhaust_the_stack():
    assert evaluate_formula(["("] * 50_000 + ["7"] + [")"] * 50_000) == 7


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=12))
def test_random_entries_agree_with_pythons_grammar(entries):
    assert evaluate_formula(entries) == reference(entries)


def test_well_formed_formulas_agree_with_pythons_grammar():
    rng = random.Random(0)

    def draw(size):
        if size == 1:
            return [str(rng.randint(1, 10))]
        cut = rng.randint(1, size - 1)
        entries = [*draw(cut), rng.choice("+-*/"), *draw(size - cut)]
        return ["(", *entries, ")"] if rng.random() < 0.5 else entries

    for _ in range(2000):
        entries = draw(rng.randint(1, 7))
        assert evaluate_formula(entries) == reference(entries)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=4), max_size=6))
def test_evaluation_is_total(entries):
    evaluate_formula(entries)


@cache
def reachable(hand):
    """All values that any combination of the whole hand can take, by joining pairs."""
    if len(hand) == 1:
        return frozenset(hand)
    values = set()
    for i, j in itertools.combinations(range(len(hand)), 2):
        rest = [hand[k] for k in range(len(hand)) if k not in (i, j)]
        a, b = hand[i], hand[j]
        for joined in {a + b, a - b, b - a, a * b, *([a / b] if b else []), *([b / a] if a else [])}:
            values |= reachable(tuple(sorted([*rest, joined])))
    return frozenset(values)


HANDS = list(itertools.combinations_with_replacement(range(1, 11), 4))


def test_every_hand_of_points24():
    """566 of the 715 hands are solvable, about four fifths; the solver's formulas are right for each."""
    begin = time.perf_counter()
    answers = {hand: solve(hand, 24) for hand in HANDS}
    assert time.perf_counter() - begin < 15  # measured 1 s
    assert sum(answer is not None for answer in answers.values()) == 566
    for hand, answer in answers.items():
        if answer is not None:
            *entries, last = answer
            assert last == "="
            assert reference(entries) == 24
            assert sorted(int(e) for e in entries if e.isdigit()) == list(hand)
            assert len(answer) <= 12


def test_brackets_only_where_needed_and_the_first_formula_among_equals():
    """Where bracket-free formulas exist, the answer is the first of them in the stated order."""
    order = [*map(str, range(1, 11)), *formula.OPERATORS].index
    for hand in random.Random(1).sample(HANDS, 60):
        plain = []
        for numbers in set(itertools.permutations(map(str, hand))):
            for a, b, c in itertools.product("+-*/", repeat=3):
                entries = [numbers[0], a, numbers[1], b, numbers[2], c, numbers[3]]
                if evaluate_formula(entries) == 24:
                    plain.append(entries)
        answer = solve(hand, 24)
        if plain:
            assert answer == [*min(plain, key=lambda entries: [order(entry) for entry in entries]), "="]
        elif answer is not None:
            assert "(" in answer


def test_share_of_deals_that_are_solvable():
    """J, Q and K count as 10, which is therefore dealt four times as often: 73.1 % of the deals."""
    dealt = [min(rank, 10) for rank in range(1, 14)]
    solvable = sum(solve(hand, 24) is not None for hand in itertools.product(dealt, repeat=4))
    assert solvable / 13**4 == pytest.approx(0.7309, abs=1e-4)


def test_solvable_hands_agree_with_brute_force():
    for hand in random.Random(0).sample(HANDS, 100):
        brute = Fraction(24) in reachable(tuple(Fraction(n) for n in hand))
        assert (solve(hand, 24) is not None) == brute


def test_following_an_answer_leads_through_the_answers_to_its_prefixes():
    for hand in [(1, 5, 5, 5), (3, 3, 8, 8), (2, 3, 4, 6), (4, 4, 10, 10), (1, 3, 4, 6)]:
        answer = solve(hand, 24)
        for done in range(len(answer)):
            formula._answers.clear()  # else the first answer's prefixes are remembered
            assert solve(list(reversed(hand)), 24, answer[:done]) == answer[done:]


@pytest.mark.parametrize(
    ("cards", "target", "prefix", "rest"),
    [
        ([5, 7], 12, [], "5 + 7 ="),
        ([7, 5], 12, [], "5 + 7 ="),
        ([5, 7], 12, ["7"], "+ 5 ="),
        ([5, 7], 12, ["5", "*"], None),
        ([5, 7], 12, ["5", "+", "7"], "="),
        ([5, 7], 12, ["5", "+", "7", "+"], None),
        ([5, 7], 12, ["6"], None),
        ([5, 7], 12, ["("], "5 + 7 ) ="),
        ([5, 7], 12, ["(", "(", "5"], "+ 7 ) ) ="),
        ([5, 7], 12, [")"], None),
        ([6, 6], 36, [], "6 * 6 ="),
        ([1, 5, 5, 5], 24, ["("], "5 - 1 / 5 ) * 5 ="),
        ([1, 1, 1, 1], 24, [], None),
        ([24], 24, [], "24 ="),
    ],
)
def test_completions(cards, target, prefix, rest):
    assert solve(cards, target, prefix) == (None if rest is None else rest.split())


def test_ezpoints_operators_only():
    assert solve([2, 10], 12, operators=("+", "*")) == ["2", "+", "10", "="]
    assert solve([1, 3, 4], 16, operators=("+", "*")) is None
    assert solve([1, 3, 4], 16) == ["4", "*", "(", "1", "+", "3", ")", "="]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(HANDS), st.lists(st.sampled_from(TOKENS), max_size=7), st.integers(-5, 40))
def test_completions_of_random_prefixes_are_right(hand, tokens, target):
    prefix, left = [], list(hand)
    for token in tokens:  # drop what does not belong, so that more prefixes are sensible
        if token.isdigit():
            token = str(left.pop(int(token) % len(left))) if left else "+"
        prefix.append(token)
    rest = solve(hand, target, prefix)
    if rest is not None:
        assert reference([*prefix, *rest[:-1]]) == target
        assert sorted(int(e) for e in [*prefix, *rest] if e.isdigit()) == list(hand)


@cache
def completions(prefix, left, target, most):
    """Whether some completion of at most `most` entries exists, trying every entry."""
    if not left and evaluate_formula(prefix) == target:
        return True
    if most == 0:
        return False
    entries = [*map(str, sorted(set(left))), *"+-*/()"]
    for entry in entries:
        rest = list(left)
        if entry.isdigit():
            rest.remove(int(entry))
        if completions((*prefix, entry), tuple(rest), target, most - 1):
            return True
    return False


@pytest.mark.parametrize("cards", [(1, 2), (2, 3), (4, 4), (1, 2, 3), (2, 5, 10)])
def test_answers_are_shortest_and_complete_by_trying_everything(cards):
    most = 5
    for target in range(-2, 11):
        rest = solve(cards, target)
        brute = next((n for n in range(most + 1) if completions((), cards, target, n)), None)
        if rest is not None and len(rest) - 1 <= most:
            assert brute == len(rest) - 1
        else:
            assert brute is None


@pytest.mark.parametrize(
    ("cards", "operators", "text"),
    [
        ([], ("+",), "1 to 5 numbers"),
        ([1] * 6, ("+",), "1 to 5 numbers"),
        ([1000], ("+",), r"0\.\.999"),
        ([1, 2], ("+", "^"), r"unknown operators \['\^'\]"),
    ],
)
def test_bad_questions(cards, operators, text):
    with pytest.raises(ValueError, match=text):
        solve(cards, 24, operators=operators)
