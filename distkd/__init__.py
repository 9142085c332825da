"""distkd: distributed training that distils a teacher which sees everything into a student for the clinic."""

__version__ = "0.1.0"
