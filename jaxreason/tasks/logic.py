"""Logic: who of several people tells the truth, and where one-way roads lead.

Ann, Ben and Leo each always tell the truth or always lie. Ann says: Ben lies. ... Write T or L for each, in this order.
<think>T-T-T:Ann no;T-T-L:Ann no;T-L-T:yes</think><answer>T-L-T</answer>

Roads lead one way: from A to C, from C to D. Can one get from A to D?
<think>A:C;C:D</think><answer>yes</answer>
"""

from __future__ import annotations

import itertools
import random

from jaxreason.tasks.procedural import DIGITS, Written, check_span, endless, pieces
from jaxreason.tasks.task import Task

NAMES: tuple[str, ...] = ("Ann", "Ben", "Leo", "Mia", "Sam", "Tom")
PEOPLE = (
    "{} and {} each always tell the truth or always lie. {} Write T for a truth teller or L for a liar for each, in this order."
)
SAYS = "{} says: {}."
PLACES = "ABCDEFGHIJ"
ROADS = "Roads lead one way: {}. Can one get from {} to {}?"
ROAD = "from {} to {}"

# A claim: one person (about, truthful), two such joined by 'and' or 'or', or two people being 'alike' or 'unlike'.
Claim = tuple[str, int, bool, int, bool]


# ---------------------------------------------------------------------------------------------------------- truth tellers


def truth_tellers(
    *, seed: int = 0, heldout_size: int = 256, prompt: str = "as_it_is", min_people: int = 2, max_people: int = 4
) -> Task:
    """Everyone says one thing about the others, and there is just one way in which all of it fits."""
    check_span(min_people, max_people, smallest=2, largest=5, names=("min_people", "max_people"))

    def draw(rng: random.Random) -> tuple[str, tuple[Claim, ...]]:
        count = rng.randint(min_people, max_people)
        claims = tuple(_claim(rng, speaker, count) for speaker in range(count))
        return repr(claims), claims

    said = "T no tells the truth lies and lies or lies are alike are different"
    words = pieces(PEOPLE, SAYS, said, " and,", "-L-T:;", "yes", *(f"{name} {name}" for name in NAMES))
    told = {"prompt": prompt, "name": "truth_tellers", "rule": "choice.short_answer", "words": words}
    return endless(draw, _write_people, seed=seed, heldout_size=heldout_size, **told)


def _claim(rng: random.Random, speaker: int, count: int) -> Claim:
    others = [person for person in range(count) if person != speaker]
    one = rng.choice(others)
    kind = rng.choice(("one", "and", "or", "alike", "unlike")) if len(others) > 1 else "one"
    another = rng.choice([person for person in others if person != one]) if len(others) > 1 else one
    return kind, one, rng.random() < 0.5, another, rng.random() < 0.5


def holds(claim: Claim, truthful: tuple[bool, ...]) -> bool:
    """Whether what was claimed is so, where it is known who is truthful."""
    kind, one, is_one, another, is_another = claim
    first, second = truthful[one] == is_one, truthful[another] == is_another
    if kind == "one":
        return first
    if kind in ("and", "or"):
        return (first and second) if kind == "and" else (first or second)
    return (truthful[one] == truthful[another]) == (kind == "alike")


def _write_people(rng: random.Random, claims: tuple[Claim, ...]) -> Written | None:
    names = rng.sample(NAMES, len(claims))
    thought, solutions = [], []
    for truthful in itertools.product((True, False), repeat=len(claims)):
        misfit = next((who for who, claim in enumerate(claims) if holds(claim, truthful) != truthful[who]), None)
        letters = "-".join("T" if each else "L" for each in truthful)
        if misfit is None:
            solutions.append(letters)
        if not solutions or misfit is None:
            thought.append(f"{letters}:yes" if misfit is None else f"{letters}:{names[misfit]} no")
    if len(solutions) != 1:
        return None
    said = " ".join(SAYS.format(names[who], _said(claim, names)) for who, claim in enumerate(claims))
    question = PEOPLE.format(", ".join(names[:-1]), names[-1], said)
    return Written(question, solutions[0], ";".join(thought), metadata={"claims": claims})


def _said(claim: Claim, names: list[str]) -> str:
    kind, one, is_one, another, is_another = claim
    first, second = (f"{names[p]} {'tells the truth' if t else 'lies'}" for p, t in ((one, is_one), (another, is_another)))
    if kind == "one":
        return first
    if kind in ("and", "or"):
        return f"{first} {kind} {second}"
    return f"{names[one]} and {names[another]} are {'alike' if kind == 'alike' else 'different'}"


# ------------------------------------------------------------------------------------------------------------------ roads


def graph_reachability(
    *,
    seed: int = 0,
    heldout_size: int = 256,
    prompt: str = "as_it_is",
    min_places: int = 4,
    max_places: int = 7,
    roads_per_place: float = 1.2,
) -> Task:
    """One-way roads between places, and whether they lead from one to another; half of the answers are yes."""
    check_span(min_places, max_places, smallest=3, largest=len(PLACES), names=("min_places", "max_places"))
    if not 0.5 <= roads_per_place <= 2:
        raise ValueError(f"roads_per_place is {roads_per_place}: expected 0.5 to 2, beyond which nearly all answers are alike")

    def draw(rng: random.Random) -> tuple[str, tuple[list[tuple[int, int]], int, int]]:
        wanted = rng.random() < 0.5
        while True:  # most draws have such a pair
            places = rng.randint(min_places, max_places)
            ways = list(itertools.permutations(range(places), 2))
            roads = rng.sample(ways, max(2, round(roads_per_place * places)))
            starts = {begin for begin, _ in roads}
            pairs = [(a, b) for a, b in ways if a in starts and (a, b) not in roads and (b in _walk(roads, a)[0]) == wanted]
            if pairs:
                a, b = rng.choice(pairs)
                return repr((sorted(roads), a, b)), (roads, a, b)

    words = pieces(ROADS, ROAD, ", :;", "yes", "no", *(f"{place} {place}" for place in PLACES), DIGITS)
    told = {"prompt": prompt, "name": "graph_reachability", "rule": "choice.short_answer", "words": words}
    return endless(draw, _write_roads, seed=seed, heldout_size=heldout_size, **told)


def _walk(roads: list[tuple[int, int]], start: int, stop: int | None = None) -> tuple[set[int], list[tuple[int, list[int]]]]:
    """The places that one gets to, nearest first, until `stop` is among them; and what was found new at each."""
    seen, todo, found = {start}, [start], []
    for place in todo:  # grows while we read it
        new = sorted({end for begin, end in roads if begin == place} - seen)
        found.append((place, new))
        seen.update(new)
        todo.extend(new)
        if stop in seen:
            break
    return seen, found


def _write_roads(rng: random.Random, content: tuple[list[tuple[int, int]], int, int]) -> Written:
    roads, a, b = content
    listed = ", ".join(ROAD.format(PLACES[begin], PLACES[end]) for begin, end in roads)
    seen, found = _walk(roads, a, b)
    thought = ";".join(f"{PLACES[place]}:{','.join(PLACES[end] for end in new) or 'no'}" for place, new in found)
    return Written(ROADS.format(listed, PLACES[a], PLACES[b]), "yes" if b in seen else "no", thought)
