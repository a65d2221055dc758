"""Web pages: templates, assets and their routes."""

from service.api.web import assets, cluster, comparisons, docs, job, jobs, logs, settings, submit

ROUTERS = (
    comparisons.router,
    assets.router,
    docs.router,
    jobs.router,
    job.router,
    logs.router,
    submit.router,
    cluster.router,
    settings.router,
)
