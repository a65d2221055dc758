"""Schemas of readiness checks."""

from pydantic import BaseModel, Field


class Check(BaseModel):
    """Health of one dependency."""

    ok: bool
    detail: str


class Readiness(BaseModel):
    """Health of all dependencies."""

    ready: bool
    database: Check
    ray: Check
    mlflow: Check
    storage: Check = Field(description="whether the folder that is shared with the cluster can be written to")
    dispatcher: Check = Field(description="whether this replica looks after jobs")
