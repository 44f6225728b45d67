"""Checkable instructions: a question about a town, whose facts stand in the prompt, and one constraint on the answer.

The towns are invented (`towns.tsv`), so nothing has to be known, and wanted answers are composed from the table. Towns are
dealt to the parts; every town of a part has as many questions of each kind.
"""

import csv
import json
import random
from pathlib import Path
from typing import Any

from chats import Record, Task, answer, question
from constraints import KINDS

__all__ = ["TASK", "make", "words_of"]

TABLE = Path(__file__).with_name("towns.tsv")

PARTS = {"train": (50, 2), "dev": (10, 1), "test": (25, 1)}
"""Towns of each part, and questions of each kind about each of them."""

Town = dict[str, str]
ATTRIBUTES = ("river", "founded", "inhabitants", "product", "festival")

QUESTIONS = {
    "river": ("Which river does {town} lie on?", "What is the name of the river in {town}?"),
    "founded": ("When was {town} founded?", "How old is {town}?"),
    "inhabitants": ("How many people live in {town}?", "How large is {town}?"),
    "product": ("What is {town} known for?", "What does {town} make?"),
    "festival": ("When is the festival of {town}?", "In which month does {town} celebrate?"),
}

NAMES = {
    "river": "its river",
    "founded": "the year of its founding",
    "inhabitants": "its number of inhabitants",
    "product": "what it is known for",
    "festival": "the month of its festival",
}

CLAUSES = {
    "river": "lies on the river {river}",
    "founded": "was founded in {founded}",
    "inhabitants": "has {inhabitants} inhabitants",
    "product": "is known for its {product}",
    "festival": "celebrates its festival in {festival}",
}

SENTENCES = {
    "English": {
        "river": ("{town} lies on the river {river}.", "The river {river} runs through {town}."),
        "founded": ("{town} was founded in {founded}.", "The town of {town} dates from {founded}."),
        "inhabitants": ("{town} has {inhabitants} inhabitants.", "There are {inhabitants} people in {town}."),
        "product": ("{town} is known for its {product}.", "The town of {town} is famous for {product}."),
        "festival": ("The festival of {town} is in {festival}.", "{town} celebrates its festival in {festival}."),
    },
    "French": {
        "river": ("{town} se trouve au bord de la rivière {river}.", "La rivière {river} coule dans la ville de {town}."),
        "founded": ("La ville de {town} a été fondée en {founded}.", "La fondation de la ville de {town} date de {founded}."),
        "inhabitants": ("La ville de {town} compte {inhabitants} habitants.", "Il y a {inhabitants} habitants dans {town}."),
        "product": ("La ville de {town} est connue pour {product}.", "{town} est une ville connue pour {product}."),
        "festival": ("La fête de {town} a lieu en {festival}.", "La ville de {town} célèbre sa fête en {festival}."),
    },
    "Spanish": {
        "river": ("{town} está a orillas del río {river}.", "El río {river} pasa por la ciudad de {town}."),
        "founded": ("La ciudad de {town} fue fundada en {founded}.", "La fundación de la ciudad de {town} data de {founded}."),
        "inhabitants": ("La ciudad de {town} tiene {inhabitants} habitantes.", "En {town} viven {inhabitants} personas."),
        "product": ("La ciudad de {town} es conocida por {product}.", "{town} es una ciudad conocida por {product}."),
        "festival": ("La fiesta de {town} es en {festival}.", "La ciudad de {town} celebra su fiesta en {festival}."),
    },
    "German": {
        "river": ("{town} liegt am Fluss {river}.", "Der Fluss {river} fließt durch {town}."),
        "founded": ("Die Stadt {town} wurde im Jahr {founded} gegründet.", "{town} ist eine Stadt aus dem Jahr {founded}."),
        "inhabitants": ("Die Stadt {town} hat {inhabitants} Einwohner.", "In der Stadt {town} leben {inhabitants} Menschen."),
        "product": ("{town} ist für {product} bekannt.", "Die Stadt {town} ist bekannt für {product}."),
        "festival": ("Das Fest von {town} ist im {festival}.", "Die Stadt {town} feiert ihr Fest im {festival}."),
    },
}

WORDS = {
    "French": {
        "glass": "le verre", "honey": "le miel", "wool": "la laine", "cheese": "le fromage", "pottery": "la poterie",
        "paper": "le papier", "silk": "la soie", "salt": "le sel", "bells": "les cloches", "boats": "les bateaux",
        "apples": "les pommes", "leather": "le cuir", "January": "janvier", "February": "février", "March": "mars",
        "April": "avril", "May": "mai", "June": "juin", "July": "juillet", "August": "août", "September": "septembre",
        "October": "octobre", "November": "novembre", "December": "décembre",
    },
    "Spanish": {
        "glass": "el vidrio", "honey": "la miel", "wool": "la lana", "cheese": "el queso", "pottery": "la cerámica",
        "paper": "el papel", "silk": "la seda", "salt": "la sal", "bells": "las campanas", "boats": "los barcos",
        "apples": "las manzanas", "leather": "el cuero", "January": "enero", "February": "febrero", "March": "marzo",
        "April": "abril", "May": "mayo", "June": "junio", "July": "julio", "August": "agosto", "September": "septiembre",
        "October": "octubre", "November": "noviembre", "December": "diciembre",
    },
    "German": {
        "glass": "Glas", "honey": "Honig", "wool": "Wolle", "cheese": "Käse", "pottery": "Keramik", "paper": "Papier",
        "silk": "Seide", "salt": "Salz", "bells": "Glocken", "boats": "Boote", "apples": "Äpfel", "leather": "Leder",
        "January": "Januar", "February": "Februar", "March": "März", "April": "April", "May": "Mai", "June": "Juni",
        "July": "Juli", "August": "August", "September": "September", "October": "Oktober", "November": "November",
        "December": "Dezember",
    },
}  # fmt: skip
"""What changes with the language: products, with their article where one has it, and months."""

PHRASES = ("I hope this helps.", "Ask me anything else.", "That is all I know.", "Thank you for asking.", "Enjoy your visit!")

ASKED = {
    "one sentence": ("Answer in one sentence.", "Reply with a single sentence.", "Use exactly one sentence."),
    "json": ("Reply with valid JSON with the keys {keys} only.", "Answer as a JSON object that has the keys {keys}."),
    "no list": ("Do not use a list.", "Write without lists.", "No bullet points, please."),
    "below": ("Use fewer than {words} words.", "Answer in less than {words} words."),
    "language": ("Answer in {language}.", "Reply in {language}."),
    "ending": ('End your answer with "{phrase}"', 'The last words of your answer must be "{phrase}"'),
}

SYSTEM_PROMPT = (
    "You answer questions about towns from the facts that you are given. Every question comes with an instruction on the form"
    " of the answer. Follow it exactly, state the facts that were asked for, and write nothing else."
)


def make(_: Path | None) -> dict[str, list[Record]]:
    """All parts."""
    draw = random.Random(0)
    with open(TABLE, encoding="utf-8", newline="") as stream:
        towns = iter(list(csv.DictReader(stream, delimiter="\t")))
    parts = {}
    for name, (count, each) in PARTS.items():
        chosen = [next(towns) for _ in range(count)]
        parts[name] = [_record(kind, town, draw) for town in chosen for kind in KINDS for _ in range(each)]
        draw.shuffle(parts[name])
    return parts


def words_of(town: Town, language: str) -> Town:
    """A town's facts in a language."""
    return {name: WORDS.get(language, {}).get(value, value) for name, value in town.items()}


def _record(kind: str, town: Town, draw: random.Random) -> Record:
    """A question of a kind about a town, with its answer and what judges it."""
    count = {"one sentence": 2, "json": draw.choice((2, 3)), "no list": 3}.get(kind, 1)
    names = draw.sample(ATTRIBUTES, count)
    told = words_of(town, "English")
    constraint: dict[str, Any] = {"kind": kind}
    if kind == "json":
        keys = ["town", *names]
        constraint["keys"] = keys
        said = json.dumps({key: int(town[key]) if town[key].isdigit() else town[key] for key in keys})
    elif kind == "one sentence":
        subject = draw.choice(("{town}", "The town of {town}"))
        said = f"{subject} {' and '.join(CLAUSES[name] for name in names)}."
    elif kind == "no list":
        first, second, third = (CLAUSES[name] for name in names)
        said = draw.choice((f"{{town}} {first} and {second}. It {third}.", f"{{town}} {first}. It {second} and {third}."))
    else:
        language = draw.choice(tuple(WORDS)) if kind == "language" else "English"
        told = words_of(town, language)
        said = draw.choice(SENTENCES[language][names[0]])
        if kind == "language":
            constraint["language"] = language
        elif kind == "ending":
            constraint["phrase"] = draw.choice(PHRASES)
            said += f" {constraint['phrase']}"
        else:
            constraint["words"] = len(said.split()) + draw.choice((1, 2, 3))
    said = said if kind == "json" else said.format(**told)
    return {
        "prompt": question(f"{_facts(town)}\n\n{_asked(names, town, draw)} {_instruction(constraint, draw)}"),
        "completion": answer(said),
        "group": town["town"],
        "constraint": constraint,
        "facts": [told[name] for name in names],
    }


def _facts(town: Town) -> str:
    return (
        "Facts about {town}: it lies on the river {river}; it was founded in {founded}; it has {inhabitants} inhabitants; it is"
        " known for {product}; its festival is in {festival}."
    ).format(**town)


def _asked(names: list[str], town: Town, draw: random.Random) -> str:
    """The question."""
    if len(names) == 1:
        return draw.choice(QUESTIONS[names[0]]).format(**town)
    *most, last = (NAMES[name] for name in names)
    return draw.choice(("Tell me this about {town}:", "What do you know of {town}? Say")).format(**town) + (
        f" {', '.join(most)} and {last}."
    )


def _instruction(constraint: dict[str, Any], draw: random.Random) -> str:
    """The constraint in words."""
    keys = ", ".join(f'"{key}"' for key in constraint.get("keys", ()))
    return draw.choice(ASKED[constraint["kind"]]).format(**(constraint | {"keys": keys}))


TASK = Task("instructions", make, SYSTEM_PROMPT, 64)
