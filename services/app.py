"""The Serve application: `serve run services.app:build model=DIR experts.hosts=4`, or from a config file."""

from pathlib import Path

from ray import serve
from ray.serve import Application

from cluster.spec import WorkerSpec
from services.app_args import AppArgs, service_spec
from services.replicas import AttentionReplica, Ingress, IngressSpec


def build(args: AppArgs) -> Application:
    """One ingress and its attention workers; the expert hosts start with them, as actors of their own.

    Raises what `service_spec` raises.
    """
    service = service_spec(args)
    worker = WorkerSpec(
        threads=args.attention.threads,
        max_length=args.attention.max_length,
        cache_tokens=args.attention.cache_tokens,
        block_size=args.attention.block_size,
        step_tokens=args.attention.step_tokens,
        running=args.attention.running,
        expert_deadline_s=args.attention.expert_deadline_s,
        gpus=args.attention.gpus,
    )
    ingress = IngressSpec(
        service=service,
        served_name=args.served_name or Path(service.model).name,
        max_length=min(worker.max_length, worker.cache_tokens),
        api_key=args.api_key,
        admin_token=args.admin_token,
        max_in_flight=args.max_in_flight,
        worker_deadline_s=args.worker_deadline_s,
    )
    attention = serve.deployment(AttentionReplica).options(
        name="attention",
        num_replicas=args.attention.replicas,
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,  # it drains by itself: Serve sees none of its streams
        ray_actor_options={"num_cpus": args.attention.cpus, "num_gpus": args.attention.gpus},
    )
    door = serve.deployment(Ingress).options(
        name="ingress",
        num_replicas=args.ingress_replicas,
        max_ongoing_requests=4 * args.max_in_flight,
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.5,  # in which proxies hear of it; what comes later is sent to another
        ray_actor_options={"num_cpus": args.control_cpus},
    )
    application: Application = door.bind(ingress, attention.bind(service, worker))
    return application
