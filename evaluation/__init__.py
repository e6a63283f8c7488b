"""How good reconstructions are, and the user's own files.

metrics.py      SSIM in four conventions, PSNR, scores per organ, code usage
body.py         the body in a slice, for the score ssim_body
plots.py        figures of slices, codes and runs
report.py       HTML page of a run, comparison of runs    python -m evaluation.report
reconstruct.py  the user's own files: encode, decode, score, codes as .npz
export_onnx.py  encoder.onnx and decoder.onnx             python -m evaluation.export_onnx
"""
