"""Training of draft heads for a target model: `vllm-specplus train`.

Stages, each kept in the output folder and not done twice: text that the target writes itself
(text.py, target.py), its hidden states over that text (teacher.py, corpus.py), heads fitted to them
(trainer.py), and a report (acceptance.py, report.py). A kind of heads is a class of the protocol
`heads.Heads`: mtp3.py and medusa.py are two.
"""
