# make study [PROFILE=smoke|laptop|gpu|paper] [CORPUS=folder] [SEEDS=n]   runs the notebooks, shows the ledger
# make test                                                              checks everything
# make lab                                                               opens JupyterLab
# PYTHON=python3.11 chooses the interpreter that the environment is made with.
PROFILE ?= laptop
CORPUS ?= embedded
SEEDS ?= 0
PYTHON ?= python3

.PHONY: study test lab

study: .venv/.ready
	@.venv/bin/mome study --profile "$(PROFILE)" --corpus "$(CORPUS)" --seeds "$(SEEDS)"

test: .venv/.ready
	@.venv/bin/ruff check . && .venv/bin/mypy && .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lab: .venv/.ready
	@.venv/bin/jupyter lab notebooks

# The environment is made once, and again when what it consists of changes.
.venv/.ready: pyproject.toml constraints.txt
	@echo "making the environment in .venv (once, a few minutes)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make study PYTHON=python3.11')"
	@$(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lab,peers,test]"
	@touch $@
