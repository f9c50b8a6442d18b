"""The idea: ST-AR's random choices, objective, student and teacher, for our transformer or anybody's decoder. Read
objective.py first.

    masking     every random choice: views, key masks, dropped labels, positions; pure functions of seed, epoch, image
    batches     (step, Batch) from stored codes, with all of these: what Teacher.features and Student take
    objective   one function an equation, on features alone
    Student     a model (FeatureModel) and a projector as one module; its forward pass returns the losses
    Teacher     the moving average of the student's model
"""

from star_fast.config import MethodConfig
from star_fast.method.batch import Batch, batches, make_batch
from star_fast.method.objective import Losses
from star_fast.method.student import Projector, Student
from star_fast.method.teacher import Teacher, ema_decay
from star_fast.model.features import FeatureModel, Features

__all__ = [
    "Batch",
    "FeatureModel",
    "Features",
    "Losses",
    "MethodConfig",
    "Projector",
    "Student",
    "Teacher",
    "batches",
    "ema_decay",
    "make_batch",
]
