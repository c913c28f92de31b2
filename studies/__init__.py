"""What the papers measure and draw, and how we measure ourselves.

One image: `explain` (the method's own tensors in it). A checkpoint of any method: `alignment` (does
the score follow the IoU, and what does it cost that it does not?), `errors` (what keeps AP down),
`sweep` (one forward pass, many settings), `sections` (Double-Head's Section 3), `scores` (CPM's
Figures 5 and 6), `assignment` (DC loss's IAC score), `sensitivity` (DC loss's Figure 1). Several
checkpoints: `models` (lines; a map of lambdas). The code: `compare` (methods and their baselines
over seeds, and the tables), `cost` (parameters and multiply-adds), `bench` (time beside
torchvision), `torchvision_rcnn` (torchvision's detector on the same data).

Each is run as `python -m studies.NAME METHOD`. Three write for readers: `question` (which of ten
boxes each method keeps), `step` (docs/step.md) and `pages` (each method file as a page, with
`formulas`). The others are shared: `checkpoint` (what a study starts with), `boxes`, `calibration`
(D-ECE and LRP error), `windows` (for `sections`), `seen` and `inside_*` (for `explain`).
"""
