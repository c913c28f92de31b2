"""What the papers measure and draw, and how we measure ourselves.

Of a checkpoint of any method: `sweep` (one forward pass, many settings), `alignment` (does the score
follow the IoU?), `sections` (Double-Head's Section 3), `scores` (CPM's Figures 5 and 6),
`sensitivity` (DC loss's Figure 1). Of several checkpoints: `models` (lines; a map of lambdas). Of
the code: `compare` (a method and its baseline over seeds), `cost` (parameters and multiply-adds),
`bench` (time beside torchvision).
Each is run as `python -m studies.NAME METHOD`; `checkpoint.py` is what they begin with.
"""
