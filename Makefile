# Each target works on a fresh clone and needs only python3 (3.10 or later). The environment is
# in .venv. "make pelvis" and "make brain" also need real scans, which are not in the repository.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint figures sharpness drawings pelvis brain faults fuzz speed test-pythons clean

train: .venv/runtime       ## train on the sample data, then print the next command
	$(BIN)/python train.py

test: .venv/dev            ## run all tests, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/dev            ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .

# ---------------------------------------------------------------- figures and models

# Copy a run's test scores to benchmarks/results, without the path of its data folder.
copy_scores = sed 's|"data": ".*/|"data": "|' runs/$(1)/test/metrics.json \
    > benchmarks/results/test_$(1).json

FIGURES := runs/figures
figures: .venv/runtime     ## draw the diagrams and the figures of the sample in resources/
	$(BIN)/python resources/draw_figures.py
	test -d sample_data || $(BIN)/python -m mri.phantom
	rm -rf $(FIGURES)
	$(BIN)/python train.py --data sample_data --epochs 10 --plot-every 3 --name figures
	$(BIN)/python predict.py --run $(FIGURES)
	for n in 1 3 6 10; do \
	    cp $(FIGURES)/plots/epoch_$$n/epoch_$${n}_images.png resources/sample_epoch_$$n.png; \
	done
	cp $(FIGURES)/loss_ssim_plot.png resources/sample_curves.png
	cp $(FIGURES)/test/code_map.png resources/sample_code_map.png

sharpness: .venv/dev       ## train on the sample with and without --gan, compare sharpness: 15 min
	test -d sample_data || $(BIN)/python -m mri.phantom
	rm -rf runs/sample_plain runs/sample_gan
	$(BIN)/python train.py --data sample_data --epochs 40 --name sample_plain
	$(BIN)/python train.py --data sample_data --epochs 40 --gan --name sample_gan
	$(BIN)/python benchmarks/sharpness.py --runs runs/sample_plain runs/sample_gan
	$(BIN)/python predict.py --run runs/sample_plain
	$(BIN)/python predict.py --run runs/sample_gan
	$(call copy_scores,sample_plain)
	$(call copy_scores,sample_gan)

DRAWN := runs/phantom_gan
TEST_SLICE := phantom_data/keras_slices_test/case_3001_week_0_slice_10.nii.gz
drawings: .venv/dev        ## train a VQ-VAE and a flow on 280 phantoms, generate slices: 1 to 3 h
	test -d phantom_data || \
	    $(BIN)/python -m mri.phantom --out phantom_data --patients 200 40 40
	rm -rf $(DRAWN)
	$(BIN)/python train.py --data phantom_data --gan --epochs 6 --name phantom_gan
	$(BIN)/python train_prior.py --run $(DRAWN) --epochs 20 --keep-every 5
	for n in 5 10 15; do \
	    $(BIN)/python generate.py --run $(DRAWN) --evaluate --count 64 \
	        --prior $(DRAWN)/prior/epoch_$$n.pt --out $(DRAWN)/epoch_$$n || exit 1; \
	    cp $(DRAWN)/epoch_$$n/evaluation.json benchmarks/results/generated_epoch_$$n.json; \
	done
	$(BIN)/python generate.py --run $(DRAWN) --complete $(TEST_SLICE)
	$(BIN)/python generate.py --run $(DRAWN) --evaluate --count 160
	for name in slices closest completion; do \
	    cp $(DRAWN)/generated/$$name.png resources/generated_$$name.png; \
	done
	cp $(DRAWN)/generated/evaluation.json benchmarks/results/generated_phantom.json

need_real_data = @test -d "$$HIPMRI_REAL_DATA" || \
    { echo 'set $$HIPMRI_REAL_DATA to a folder of real scans'; exit 1; }

pelvis: .venv/runtime      ## train resources/pelvis.pt, the bundled model: 30 min
	$(need_real_data)
	rm -rf runs/pelvis
	$(BIN)/python resources/make_pelvis.py
	$(call copy_scores,pelvis)

BRAIN = $$HIPMRI_REAL_DATA/brain_volume/anat-T1w.nii.gz
BRAIN_OUT := runs/brain_out
# Copy a table of scores to benchmarks/results, without the path of the scan's folder.
copy_table = sed 's|,[^,]*/brain_volume/|,brain_volume/|' $(1) > benchmarks/results/$(2)
brain: .venv/runtime       ## train a model of one brain and compare it with pelvis.pt: 30 min
	$(need_real_data)
	rm -rf runs/brain $(BRAIN_OUT)
	$(BIN)/python train.py --data $(BRAIN) --axis coronal --name brain
	$(BIN)/python predict.py $(BRAIN) --run runs/brain -o $(BRAIN_OUT) --export-codes
	$(BIN)/python predict.py $(BRAIN) --runs-dir resources -o $(BRAIN_OUT)/pelvis --export-codes
	cp $(BRAIN_OUT)/anat-T1w.png resources/brain.png
	$(call copy_table,$(BRAIN_OUT)/scores.csv,brain.csv)
	$(call copy_table,$(BRAIN_OUT)/pelvis/scores.csv,brain_by_pelvis.csv)

# ---------------------------------------------------------------- long tests

faults: .venv/dev          ## kill scripts 50 times at random moments and count lost files: 10 min
	$(BIN)/python tests/stress/faults.py

fuzz: .venv/dev            ## read 28,000 damaged files and count crashes: 2 min
	$(BIN)/python tests/stress/fuzz.py

speed: .venv/dev           ## compare the speed of this project with others: 10 to 20 min on a CPU
	$(BIN)/python benchmarks/speed.py

test-pythons:              ## run the tests on every installed Python from 3.10 to 3.13
	for version in 3.10 3.11 3.12 3.13; do \
	    python$$version -c "" 2> /dev/null || { echo "no python$$version"; continue; }; \
	    echo "python$$version"; \
	    python$$version -m venv .venv-$$version || exit 1; \
	    .venv-$$version/bin/pip install --quiet -r requirements-dev.txt || exit 1; \
	    OMP_NUM_THREADS=1 .venv-$$version/bin/python -m pytest -n 2 --dist worksteal || exit 1; \
	done

# ---------------------------------------------------------------- environment

clean:                     ## delete the environments, the sample and caches; keep runs/
	rm -rf .venv .venv-3.* sample_data .sample_data-* phantom_data .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

CHECK_VERSION = import sys; sys.version_info < (3, 10) and sys.exit( \
    "This is Python %s; expected 3.10 or later: make PYTHON=python3.12" % sys.version.split()[0])

.venv/runtime: requirements.txt
	@$(PYTHON) -c '$(CHECK_VERSION)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt benchmarks/requirements.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
