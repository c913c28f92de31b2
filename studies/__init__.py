"""What the papers measure and draw, and how we measure ourselves.

One image: `explain` (the method's own tensors in it). A checkpoint of any method: `alignment` (does
the score follow the IoU, and what does it cost that it does not?), `sweep` (one forward pass, many
settings), `sections` (Double-Head's Section 3), `assignment` (DC loss's IAC score). The code:
`compare` (methods and their baselines over seeds; `tables` shows them), `cost` (parameters and
multiply-adds), `bench` (time beside torchvision).

For readers: `question` (docs/question.png), `step` (docs/step.md), `pages` (each method file as a
web page; `formulas` writes its formulas).

`python -m studies.published FILE` makes a checkpoint of weights that a paper's authors published;
`published_rules` has the names and orders of each kind of file.

Each is run as `python -m studies.NAME METHOD`. The others are shared: `checkpoint` (what a study
starts with), `calibration` (IoU with objects, D-ECE and LRP error), `seen` and `inside_*` (for
`explain`).
"""
