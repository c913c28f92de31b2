"""What the papers measure and draw, and how we measure ourselves.

Of one image: `explain` (the method's own tensors in it). Of a checkpoint: `alignment`
(does the score follow the IoU?), `sweep` (one forward pass, many settings), `sections`
(Double-Head's Section 3), `assignment` (DC loss's IAC score). Of the code: `compare`
(methods and their baselines over seeds; `tables` shows them), `cost` (parameters and
multiply-adds), `bench` (time beside torchvision).

For readers: `question` (docs/question.png), `step` (docs/step.md), `pages` (each method
file as a web page; `formulas` writes its formulas).

`published` makes a checkpoint of weights that a paper's authors published; `published_rules`
has the names and orders of each kind of file.

Each is run as `python -m studies.NAME METHOD`. The others are shared: `checkpoint`
(command line, checkpoint and images), `calibration` (for `alignment`), `seen` and
`inside_*` (for `explain`).
"""
