"""Rows of the data sets that the coverage study of RLPT reads."""

from __future__ import annotations

import string

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
GSM8K = [
    {"question": "What is 2+3?", "answer": "2+3 = <<2+3=5>>5 is all.\n#### 5"},
    {"question": "Ann has 4 apples and eats 1. How many are left?", "answer": "4-1=3\n#### 3"},
    {
        "question": "How many is 1,000 twice?",
        "answer": "It is 2*1000=2000\nThat is a lot of apples, for one.\n#### 2,000",
    },
]
SVAMP = [
    {
        "Body": "Ann has 7.0 apples.",
        "Question": "How many?",
        "Equation": "( ( 7.0 - 5.0 ) * 1.5 )",
        "Answer": 3.0,
    },
    {
        "Body": "Bob has 2 pears.",
        "Question": "How many?",
        "Equation": "( 10.0 / 5.0 )",
        "Answer": 2.0,
    },
]
HUMANEVAL = [
    {
        "prompt": 'def one():\n    """Return 1."""\n',
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
        "entry_point": "one",
    }
]
