"""Push to the Hub while training: each save as a whole model, in the background."""

import shlex
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..errors import UserError
from ..hub.card import render_model_card
from ..hub.card_edits import write_card
from ..hub.push import push_step, push_to_hub
from ..hub.staging import Release, check_ref_names
from ..hub_errors import explain_hub_error, retry
from .stopping import InterruptibleTrainer

logger = logging.get_logger(__name__)


class PushQueue:
    """Push checkpoints one after the other in the background."""

    def __init__(self):
        self._api = HfApi()  # it runs background jobs in one thread, in their order
        self._jobs: list[tuple[Future, tempfile.TemporaryDirectory]] = []
        self._copy_errors: list[BaseException] = []

    def add(
        self,
        checkpoint: str | Path,
        repo_id: str,
        *,
        branches: list[str],
        skip_waiting: bool,
        **options: Any,
    ) -> None:
        """Push a copy of a checkpoint to each branch, with the options of `push_step`.

        With `skip_waiting`, it takes the place of pushes that have not begun.
        """
        if skip_waiting:
            for job, waiting_copy in self._jobs:
                if job.cancel():
                    waiting_copy.cleanup()
        # Training may change or delete the checkpoint before its turn comes.
        copy = tempfile.TemporaryDirectory(prefix="hf_nanogpt-push-")
        try:
            # Links stay links: push_step refuses those that lead out of the checkpoint.
            shutil.copytree(checkpoint, copy.name, symlinks=True, dirs_exist_ok=True)
        except OSError as error:  # such as a full disk, which must not stop the training
            copy.cleanup()
            self._copy_errors.append(error)
            return

        def push() -> None:
            with copy:
                for branch in branches:
                    push_step(Path(copy.name), repo_id, branch=branch, **options)

        self._jobs.append((self._api.run_as_future(push), copy))

    def finish(self) -> list[BaseException]:
        """Wait for all pushes; return the errors of those that failed."""
        raised = [job.exception() for job, _ in self._jobs if not job.cancelled()]
        errors = [*self._copy_errors, *filter(None, raised)]
        self._jobs, self._copy_errors = [], []
        return errors


class HubTrainer(InterruptibleTrainer):
    """A `Trainer` that pushes as `hub.push_to_hub` does.

    Each save goes to main as a whole model with code and card. The state for resuming goes to the
    branch `last-checkpoint`, or to one branch for each `checkpoint-N`, depending on `hub_strategy`.
    While a push is slow, only the newest save waits. Failed pushes are reported at the end. If
    somebody deletes the repository meanwhile, it is created again, and stays private if it was.
    """

    hub_model_id: Any  # the repository's id, or None before init_hf_repo

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or raise a `UserError` before training if that is impossible."""
        self.pushes = PushQueue()
        if not self.is_world_process_zero():
            return
        check_ref_names(branch=self.args.hub_revision)
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        if private is not None:  # before 5.23, Trainer's own method has no such argument
            self.args.hub_private_repo = private
        try:
            super().init_hf_repo(token)
            api = HfApi(token=token or self.args.hub_token)
            self.is_private = retry(lambda: api.repo_info(self.hub_model_id)).private
        except (HTTPError, HFValidationError) as error:
            raise UserError(
                f"hub_model_id={name} cannot be pushed to: {explain_hub_error(error)}."
            ) from error
        if not self.is_private and self.args.hub_private_repo:
            raise UserError(
                f"hub_model_id={self.hub_model_id} exists and is public: make it private on its "
                "page, or leave out hub_private_repo."
            )

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the card to `output_dir`, and keep a person's edits there."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            facts = {"num_parameters": self.model.num_parameters()}
            card = render_model_card(self.model.config, facts, name=folder.absolute().name)
            write_card(card, folder / "README.md")

    def push_to_hub(  # type: ignore[override]  # returns a Release, not a CommitInfo
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Release | None:
        """Save to `output_dir` and push it as `hub.push_to_hub` does; always wait for the end.

        Raises:
            UserError: the Hub refused; what was trained is safe in `output_dir`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return push_to_hub(
            self.args.output_dir,
            self.hub_model_id,
            branch=revision or self.args.hub_revision,
            private=self.is_private,
            message=commit_message,
            token=token or self.args.hub_token,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, strategy = self.args, self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END or self.saves_shards:
            return  # nobody can load shards as a model
        self.callback_handler.on_push_begin(args, self.state, self.control)
        branches = [args.hub_revision or "main"]
        if strategy == HubStrategy.CHECKPOINT:
            branches.append("last-checkpoint")
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            branches.append(Path(checkpoint_folder).name)
        self.pushes.add(
            checkpoint_folder,
            self.hub_model_id,
            branches=branches,
            skip_waiting=not (args.hub_always_push or strategy == HubStrategy.ALL_CHECKPOINTS),
            num_parameters=self.model.num_parameters(),
            message=f"Training in progress, step {self.state.global_step}",
            private=self.is_private,
            token=args.hub_token,
        )

    def _finish_current_push(self) -> None:
        if self.hub_model_id is None:
            return
        for error in self.pushes.finish():
            logger.error(
                f"A push during training failed: {error} To push the result: hf-nanogpt push "
                f"{shlex.quote(self.args.output_dir)} {self.hub_model_id}"
            )
