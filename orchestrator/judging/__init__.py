"""A language model as judge of generated answers: questions, verdicts, figures; which run they are of is not known here."""
