"""Score trained models, make figures and reports, and reconstruct the user's own files.

    metrics.py      four SSIM variants, PSNR, scores per organ, codebook usage
    body.py         mask of the body in a slice, for the score ssim_body
    plots.py        figures of slices, codes and runs
    report.py       HTML page of a run, comparison of runs
    reconstruct.py  find, reconstruct, score and plot the user's own files
    codec.py        encoding as codes and decoding, in memory and as .npz or .vqc files
    export_onnx.py  export of encoder.onnx and decoder.onnx

The commands are `python -m evaluation.report` and `python -m evaluation.export_onnx`.
"""
