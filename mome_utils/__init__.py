"""Helpers of the study *Mixture of Modular Experts*: the science behind the notebooks.

The notebooks tell the story; this package does the work. Its modules, from the ground up:
``config``, ``artifacts``, ``corpus``, ``tokenization``, ``dataset``, ``models``, ``distillation``,
``routing``, ``moe``, ``training``, ``evaluation``, ``forgetting``, ``claims``, ``figures``, ``study`` and the
command line ``mome``.
Importing the package imports none of them. It sees to it that transformers' Auto classes know the mixture.
"""

from mome_utils.registration import register_when_needed

__version__ = "0.1.0"

register_when_needed()
