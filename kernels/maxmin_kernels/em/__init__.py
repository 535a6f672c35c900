"""The E-step of a Bradley-Terry mixture over users."""

from .naive import em_responsibilities_naive
from .op import em_responsibilities
from .plan import UserPlan, plan_users

__all__ = ["UserPlan", "em_responsibilities", "em_responsibilities_naive", "plan_users"]
