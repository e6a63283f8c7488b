# Each target works on a fresh clone and needs only python3 (3.10 or later). The environment is in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Copy the test scores of a run to benchmarks/results, without the path of the data folder.
keep_scores = sed 's|"data": ".*/|"data": "|' runs/$(1)/test/metrics.json > runs/$(1)/kept && mv runs/$(1)/kept benchmarks/results/test_$(1).json

.PHONY: train test lint figures drawings pelvis brain faults fuzz test-pythons speed clean

train: .venv/runtime       ## train on the sample data, then print the next command
	$(BIN)/python train.py

test: .venv/dev            ## all tests, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_readme.py && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --ignore tests/test_readme.py

lint: .venv/dev            ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .

figures: .venv/runtime     ## the diagrams and the sample's pictures in resources/
	$(BIN)/python resources/draw_figures.py
	test -d sample_data || $(BIN)/python -m mri.phantom
	rm -rf runs/figures
	$(BIN)/python train.py --data sample_data --epochs 10 --plot-every 3 --name figures
	$(BIN)/python predict.py --run runs/figures
	for n in 1 3 6 10; do cp runs/figures/plots/epoch_$$n/epoch_$${n}_images.png resources/sample_epoch_$$n.png; done
	cp runs/figures/loss_ssim_plot.png resources/sample_curves.png
	cp runs/figures/test/code_map.png resources/sample_code_map.png

drawings: .venv/dev        ## the sample with and without --gan, its prior, and new slices: half an hour
	test -d sample_data || $(BIN)/python -m mri.phantom
	rm -rf runs/sample_plain runs/sample_gan
	$(BIN)/python train.py --data sample_data --epochs 40 --name sample_plain
	$(BIN)/python train.py --data sample_data --epochs 40 --gan --name sample_gan
	$(BIN)/python benchmarks/sharpness.py --runs runs/sample_plain runs/sample_gan
	for run in sample_plain sample_gan; do $(BIN)/python predict.py --run runs/$$run || exit 1; done
	$(call keep_scores,sample_plain)
	$(call keep_scores,sample_gan)
	$(BIN)/python train_prior.py --run runs/sample_gan
	$(BIN)/python generate.py --run runs/sample_gan --evaluate
	$(BIN)/python generate.py --run runs/sample_gan --temperature 0.8
	$(BIN)/python generate.py --run runs/sample_gan --temperature 0.8 --complete sample_data/keras_slices_test/case_040_week_0_slice_10.nii.gz
	for f in slices closest completion; do cp runs/sample_gan/generated/$$f.png resources/sample_drawn_$$f.png; done
	cp runs/sample_gan/prior/metrics.json benchmarks/results/prior_sample_data.json
	cp runs/sample_gan/generated/evaluation.json benchmarks/results/drawn_sample_data.json

have_real_data = test -d "$$HIPMRI_REAL_DATA" || { echo 'set $$HIPMRI_REAL_DATA: real scans are not in the repository'; exit 1; }

pelvis: .venv/runtime      ## resources/pelvis.pt, the bundled model; needs $$HIPMRI_REAL_DATA; half an hour
	@$(have_real_data)
	rm -rf runs/pelvis
	$(BIN)/python resources/make_pelvis.py
	$(call keep_scores,pelvis)

BRAIN = $$HIPMRI_REAL_DATA/brain_volume/anat-T1w.nii.gz
brain: .venv/runtime       ## a model of one brain, compared with pelvis.pt; needs $$HIPMRI_REAL_DATA; half an hour
	@$(have_real_data)
	rm -rf runs/brain runs/brain_out
	$(BIN)/python train.py --data $(BRAIN) --axis coronal --name brain
	$(BIN)/python predict.py $(BRAIN) --run runs/brain -o runs/brain_out --export-codes
	$(BIN)/python predict.py $(BRAIN) --runs-dir resources -o runs/brain_out/pelvis --export-codes
	cp runs/brain_out/anat-T1w.png resources/brain.png
	sed "s|,[^,]*/brain_volume/|,brain_volume/|" runs/brain_out/scores.csv > benchmarks/results/brain.csv
	sed "s|,[^,]*/brain_volume/|,brain_volume/|" runs/brain_out/pelvis/scores.csv > benchmarks/results/brain_by_pelvis.csv

faults: .venv/dev          ## 50 kills at random moments, and the losses: ten minutes
	$(BIN)/python tests/stress/faults.py

fuzz: .venv/dev            ## 28,000 damaged files, each must end in a slice or the one error: two minutes
	$(BIN)/python tests/stress/fuzz.py

test-pythons:              ## the tests on every installed Python from 3.10 to 3.13, each in its own environment
	for version in 3.10 3.11 3.12 3.13; do \
	    python$$version -c "" 2> /dev/null || { echo "python$$version is not installed"; continue; }; \
	    python$$version -m venv .venv-$$version && .venv-$$version/bin/pip install --quiet -r requirements-dev.txt || exit 1; \
	    echo "python$$version" && OMP_NUM_THREADS=1 .venv-$$version/bin/python -m pytest tests/test_readme.py && OMP_NUM_THREADS=1 .venv-$$version/bin/python -m pytest -n 2 --ignore tests/test_readme.py || exit 1; \
	done

speed: .venv/dev           ## speed of this project, a typical script and other libraries: ten minutes on a CPU
	$(BIN)/python benchmarks/speed.py

clean:                     ## remove the environments, the sample and caches; runs/ is kept
	rm -rf .venv .venv-3.* sample_data .sample_data-* .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("This is Python %s; expected 3.10 or later: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt benchmarks/requirements.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
