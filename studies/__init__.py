"""What the papers measure and draw, and how we measure ourselves.

One image: `explain` (the method's own tensors in it). A checkpoint of any method: `alignment` (does
the score follow the IoU, and what does it cost that it does not?), `sweep` (one forward pass, many
settings), `sections` (Double-Head's Section 3), `assignment` (DC loss's IAC score). The code:
`compare` (methods and their baselines over seeds, and the tables), `cost` (parameters and
multiply-adds), `bench` (time beside torchvision), `torchvision_rcnn` (torchvision's detector on the
same data).

Each is run as `python -m studies.NAME METHOD`. The others are shared: `checkpoint` (what a study
starts with), `calibration` (IoU with objects, D-ECE and LRP error), `seen` and `inside_*` (for
`explain`).
"""
