"""Teacher and student read alike: over the classes that the teacher's support knows. N targets, V vocabulary."""

from torch import Tensor

from losses.config import Tail
from losses.dense import DenseTeacher, HiddenTeacher, Teacher
from losses.prediction import Prediction, dense_prediction, student_prediction, teacher_prediction
from losses.support import TeacherSupport, working_dtype


def read_both(teacher: Teacher, student_logits: Tensor, targets: Tensor, tail: Tail) -> tuple[Prediction, Prediction]:
    """Return the teacher's prediction, without gradient, and the student's from its logits [N, V], at targets [N]."""
    match teacher:
        case TeacherSupport():
            student = student_prediction(student_logits, targets, teacher.topk_ids, tail)
            return teacher_prediction(teacher, tail, working_dtype(student_logits)), student
        case HiddenTeacher():
            return read_both(teacher.dense(), student_logits, targets, tail)
        case DenseTeacher():
            logits = teacher.logits.detach().to(working_dtype(student_logits))
            return dense_prediction(logits, targets), dense_prediction(student_logits, targets)
