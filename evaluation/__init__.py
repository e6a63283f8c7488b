"""Scores, figures and reports of trained models, and reconstruction of the user's own files.

    metrics.py      SSIM in four conventions, PSNR, scores per organ, code usage
    body.py         the body in a slice, for the score ssim_body
    plots.py        figures of slices, codes and runs
    report.py       HTML page of a run, comparison of runs
    reconstruct.py  the user's own files: find, reconstruct, score, plot
    codec.py        slices as codes, in memory and as .npz files
    export_onnx.py  encoder.onnx and decoder.onnx

`python -m evaluation.report` and `python -m evaluation.export_onnx` are commands.
"""
