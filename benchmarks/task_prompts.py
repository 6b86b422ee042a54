"""Prompts of everyday tasks for `vllm-specplus train`, put together from the words below: what
users ask, which `benchmarks.prompt_mix` has none of. No prompt of Spec-Bench is among them.

python -m benchmarks.task_prompts OUT.jsonl [N]
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

WORDS = {
    "topic": "volcanoes|the human heart|black holes|inflation|the French Revolution|photosynthesis"
    "|electric cars|the Roman Empire|coral reefs|vaccines|chess|jazz|the stock market|glaciers"
    "|honey bees|the printing press|earthquakes|democracy|the internet|solar power|DNA|opera"
    "|climate change|the Silk Road|antibiotics|whales|trade unions|the Moon|coffee|cryptography"
    "|Buddhism|football|the Cold War|bridges|immigration|sleep|memory|cheese|railways|poetry",
    "place": "Paris|Kenya|Texas|Japan|Berlin|Brazil|London|India|Chicago|Norway|Sydney|Cairo"
    "|New Zealand|Vietnam|Boston|Scotland|Mexico City|Poland|California|Singapore",
    "name": "Anna|Tom|Maria|James|Lily|Omar|Grace|Peter|Nina|Sam|Julia|David|Emma|Ravi|Kate|Leo",
    "person": "Isaac Newton|Cleopatra|Abraham Lincoln|Marie Curie|Mozart|Julius Caesar|Gandhi"
    "|Shakespeare|Napoleon|Charles Darwin|Queen Victoria|Leonardo da Vinci|Beethoven|Columbus",
    "work": "the first season|the new film|the old show|the second book|the musical|the sequel"
    "|the original series|the stage play|the cartoon|the remake",
    "role": "king|mother|detective|doctor|villain|younger brother|narrator|teacher|captain|boss",
    "thing": "apples|pencils|books|stamps|cookies|marbles|shirts|tickets|flowers|toy cars|eggs",
    "workplace": "a bakery|a school|a farm|a hospital|an office|a library|a garage|a hotel",
    "form": "a short story|a blog post|an email|a poem|a letter|a report|an outline|a review",
    "people": "officials|scientists|police|a judge|the company|the government|doctors|voters"
    "|the mayor|parents|a court|the minister|fans|researchers|residents|the airline",
    "act": "said|announced|warned|agreed|confirmed|denied|revealed|claimed|insisted|admitted",
    "event": "the storm|the vote|the trial|the strike|the match|a fire|the new law|the outbreak"
    "|the deal|the protest|an accident|the budget|the election|the investigation|the ceasefire",
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "wer": "Die Regierung|Der Minister|Die Polizei|Das Unternehmen|Der Trainer|Die Stadt"
    "|Ein Sprecher|Die Kommission|Der Verein|Die Forscher|Der Präsident|Die Gemeinde",
    "wann": "am Montag|im vergangenen Jahr|seit drei Wochen|nach dem Spiel|vor der Wahl"
    "|am Abend|in der Nacht|zum ersten Mal|im Sommer|bis Ende des Monats",
    "was": "einen neuen Plan vorgestellt|die Zahl der Unfälle gesenkt|viel Geld verloren"
    "|eine Lösung gefunden|die Preise erhöht|das Gebäude verkauft|die Gespräche beendet"
    "|mehr als hundert Stellen gestrichen|das Stadion umgebaut|vor den Folgen gewarnt",
    "code": "reverses a string|finds prime numbers|sorts a list|reads a CSV file|counts words"
    "|parses a date|searches a binary tree|sends a request|computes a factorial|merges two lists",
    "language": "Python|JavaScript|C++|Java|SQL|Rust|HTML",
}
"""Words for each slot of a template; {n} and {m} are numbers."""

TEMPLATES = {
    "qa": [
        "who played the {role} in {work}",
        "when did {topic} become popular in {place}",
        "what is the capital of {place}?",
        "Who was {person} and why are they famous?",
        "where does the word for {topic} come from",
        "how many {thing} are there in {place}",
        "Question: What is known about {topic} in {place}?\nAnswer:",
    ],
    "math": [
        "{name} has {n} {thing}. {name2} has {m} times as many {thing} as {name}. How many {thing} "
        "do they have altogether?",
        "{name} works at {workplace} and earns ${n} an hour. If {name} works {m} hours a day for "
        "5 days, how much money does {name} make?",
        "{name} bought {n} {thing} for ${m} each and gave {m} of them to {name2}. How much did "
        "{name} spend on the {thing} that were left?",
        "What is {n} percent of {m}00? Explain each step.",
    ],
    "writing": [
        "Write {form} about {topic}.",
        "Write {form} for {name}, who works at {workplace} in {place}.",
        "Explain {topic} to a child of {m} years. Use simple examples.",
        "What are the main causes and effects of {topic}? Give at least three of each.",
        "Compare {topic} and {topic2}. Which one mattered more in {place}, and why?",
        "Pretend to be {person}. What would you say about {topic}?",
        "List {m} facts about {topic} in {place}:\n1.",
    ],
    "translation": [
        "Translate German to English: {wer} hat {wann} {was} .",
        "Translate German to English: {wer} hat {was} , wie {place} {wann} mitteilte .",
        "Translate English to German: {name} went to {place} because of {event} .",
    ],
    "article": [
        "Summarize: {place} (CNN) -- {people} {act} {day} that {event} in {place}",
        "Summarize: By . {name} Miller . PUBLISHED: . {n}:{m}0 EST, {m} May 2013 . {people} {act} "
        "that {event}",
        "{topic} in {place} began when {person}",
        "{place} is known for {topic}. In 19{n}, {people} {act} that",
        "Passage: {topic} and {topic2} are",
        "(CNN){people} in {place} {act} on {day} that {event}",
    ],
    "coding": [
        "Write a function in {language} that {code}.",
        "What does this {language} program do? It {code} and then {code2}. Show the program.",
    ],
}


def write_prompt(rng: random.Random) -> dict[str, str]:
    """A prompt and its kind."""
    kind = rng.choice(list(TEMPLATES))
    template = rng.choice(TEMPLATES[kind])
    words = {slot: rng.sample(choices.split("|"), 2) for slot, choices in WORDS.items()}
    slots = {slot: first for slot, (first, _) in words.items()}
    slots |= {f"{slot}2": second for slot, (_, second) in words.items()}
    text = template.format(n=rng.randint(11, 60), m=rng.randint(2, 9), **slots)
    return {"prompt": text[0].upper() + text[1:] if kind != "qa" else text, "kind": kind}


def main(out: str, num: str = "2500") -> None:
    """Writes the file, the same at every call."""
    rng = random.Random(0)
    written = (json.dumps(write_prompt(rng), ensure_ascii=False) for _ in range(int(num)))
    prompts = dict.fromkeys(written)
    Path(out).write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
