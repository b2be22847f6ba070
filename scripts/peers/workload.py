"""The shared work on which engines and trainers are compared. Seeded; nothing here is measured.

`generation(n, seed)`  -> n chat prompts, half of them short arithmetic, half open-ended, so that completion lengths differ
                          by more than an order of magnitude within one batch.
`training(n, seed)`    -> n (prompt_tokens, completion_tokens) lengths: prompts 30..120, completions lognormal (median ~100,
                          clipped to 10..512), a spread like that of sampled solutions.
"""

import random

TOPICS = [
    "a lighthouse",
    "a lost key",
    "the sea in winter",
    "a bakery at dawn",
    "an old train",
    "a garden on Mars",
    "two brothers",
    "a broken clock",
    "the first snow",
    "a small robot",
    "a quiet library",
    "a river crossing",
]


def generation(n: int, seed: int = 0) -> list[list[dict[str, str]]]:
    rng = random.Random(seed)
    prompts = []
    for i in range(n):
        if i % 2 == 0:
            text = f"What is {rng.randint(1, 99)} + {rng.randint(1, 99)}? Answer in one short line."
        else:
            text = f"Write a few sentences about {rng.choice(TOPICS)} and {rng.choice(TOPICS)}."
        prompts.append([{"role": "user", "content": text}])
    return prompts


def training(n: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randint(30, 120), int(min(512, max(10, rng.lognormvariate(4.6, 0.8))))) for _ in range(n)]
