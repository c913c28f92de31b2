"""What the papers measure and draw, and how we measure ourselves.

Of a checkpoint of any method: `sweep` (one forward pass, many settings), `alignment` (does the score
follow the IoU?), `sections` (Double-Head's Section 3). Of the code: `compare` (a method and its
baseline over seeds), `cost` (parameters and multiply-adds), `bench` (time beside torchvision).
Each is run as `python -m studies.NAME METHOD`; `checkpoint.py` is what they begin with.
"""
