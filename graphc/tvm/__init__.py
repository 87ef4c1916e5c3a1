"""Compiled artifacts with Apache TVM: what the backend ``tvm`` is made of.

``install`` says whether TVM can be used, ``lower`` brings a model to the operators that its importer takes,
``importer`` makes a Relax module of it, ``schedule`` gives CPU code its loops, ``build`` compiles and links, ``emit``
writes the artifact, and ``serve`` runs it; it becomes the artifact's ``run.py`` and imports neither graphc nor TVM's
compiler.
"""
