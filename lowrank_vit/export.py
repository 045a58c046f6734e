"""`lowrank-vit export RUN`: a run's weights in timm's layout of the Hugging Face hub, in a folder or on the hub."""

from __future__ import annotations

import sys

from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit.common.program import check_versions, require_one_process, usage_name
from lowrank_vit.common.terminal import output_is_in_files, say
from lowrank_vit.config.command_line import read_options
from lowrank_vit.publish.options import ExportOptions


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv` (default: the process's arguments). Raises `UserError`."""
    require_one_process("lowrank_vit.export")
    argv = sys.argv[1:] if argv is None else argv
    options = read_options(ExportOptions, argv, usage_name("lowrank_vit.export"))
    options.check()
    check_versions()
    _export(options)


def _export(options: ExportOptions) -> None:
    from lowrank_vit.publish.folder import check_folder, fill, write_folder  # torch takes seconds, which a wrong option
    from lowrank_vit.publish.subject import read_subject  # must not cost
    from lowrank_vit.publish.upload import find_repository, upload

    if folder := options.local_dir:
        check_folder(folder, overwrite=options.overwrite)
        subject = read_subject(options)
        name, reference = folder.resolve().name, f"local-dir:{folder.name}"
        write_folder(
            folder,
            lambda made: fill(made, subject, name, reference, options.license),
            overwrite=options.overwrite,
            say=say,
        )
        where, loads = str(folder), f"local-dir:{folder}"
    else:
        repository = find_repository(options)
        subject = read_subject(options)
        name, loads = repository.name, f"hf-hub:{repository.name}"
        loads += f"@{options.revision}" if options.revision else ""
        where = upload(options, repository, lambda made: fill(made, subject, name, loads, options.license), say)
    output_is_in_files()
    say(f"exported the {'EMA' if subject.is_ema else 'raw'} weights of {subject.checkpoint.path} to {where}")
    if subject.merged:
        say(f"note: {subject.merged}")
    if not options.license:
        say("note: the card has no license yet: fill in the line at the head of its README.md, or give --license ID")
    say(f'to load it: timm.create_model("{loads}", pretrained=True)')


if __name__ == "__main__":
    exit_cleanly(main)
