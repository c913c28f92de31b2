"""What the papers measure and draw, and how we measure ourselves.

Of an image: `explain` (the method's own tensors in it). Of a checkpoint of any method: `alignment`
(does the score follow the IoU, and what does it cost that it does not?), `errors` (what keeps AP
down), `sweep` (one forward pass, many settings), `sections` (Double-Head's Section 3), `scores`
(CPM's Figures 5 and 6), `assignment` (DC loss's IAC score), `sensitivity` (DC loss's Figure 1). Of
several checkpoints: `models` (lines; a map of lambdas). Of the code: `compare` (a method and its
baseline over seeds), `cost` (parameters and multiply-adds), `bench` (time beside torchvision).

Each is run as `python -m studies.NAME METHOD`; `checkpoint.py` is what they begin with,
`calibration.py` holds D-ECE and LRP error, `seen.py` and `inside_*.py` what `explain` draws.
"""
