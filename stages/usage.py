"""What a model card says of how to use a stage's output. Imports no torch."""

from pipeline.workflow.artifacts import Artifact


def sampling(run: str, artifact: Artifact) -> str:
    """Pictures by this project's own command, which needs no export."""
    del artifact
    return f'Pictures from captions, by this project:\n\n    unclip sample {run} "a big blue ring" --count 4'


def exported(run: str, artifact: Artifact) -> str:
    """Stock diffusers where the export fits it, else why it does not."""
    del run
    if not artifact.numbers["stock_pipeline"]:
        return (
            f"The stock `UnCLIPPipeline` of diffusers cannot hold this run ({artifact.numbers['not_stock_because']}); "
            f"each network is in diffusers' format below `{artifact.path}`."
        )
    return (
        "By stock `diffusers`, which needs nothing of this project:\n\n"
        "    from diffusers import UnCLIPPipeline\n"
        f"    pipeline = UnCLIPPipeline.from_pretrained({str(artifact.path)!r})\n"
        '    pipeline("a big blue ring").images[0]\n\n'
        "`prior_guidance_scale=1, decoder_guidance_scale=1` samples without classifier-free guidance; the pipeline's "
        "own defaults are 4 and 8."
    )
