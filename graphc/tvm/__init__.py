"""Compiled artifacts with Apache TVM: what the backend ``tvm`` is made of.

``install`` says whether TVM can be used, ``lower`` brings a model to the operators that its importer takes,
``importer`` makes a Relax module of it, ``schedule`` gives CPU code its loops, ``build`` compiles and links, ``emit``
writes the artifact. TVM can crash: ``contain`` starts a process in which ``worker`` does all that. ``serve`` runs the
artifact; it becomes its ``run.py`` and imports neither graphc nor TVM's compiler.
"""
