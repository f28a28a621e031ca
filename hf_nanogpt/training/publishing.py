"""What a training pushes to the Hub: by every strategy a whole model, and nothing that is lost."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..errors import UserError
from ..hub.card import render_model_card
from ..hub.release import push_to_hub
from ..hub.staging import Release, check_ref_names, write_card
from ..hub_errors import explain_hub_error, retry
from .push_queue import PushQueue
from .stopping import InterruptibleTrainer

logger = logging.get_logger(__name__)


class HubTrainer(InterruptibleTrainer):
    """A `Trainer` that pushes what release.py makes.

    Each save goes to main as a whole model with its code and card. What resuming needs besides goes
    to the branch `last-checkpoint`, or of each `checkpoint-N`, as `hub_strategy` has it. While a
    push is slow the newest save waits, and what failed is told at the end. A repository that
    somebody deletes meanwhile is made again, and is no more public than it was.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self.pushes = PushQueue()
        if not self.is_world_process_zero():
            return
        check_ref_names(branch=self.args.hub_revision)
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        if private is not None:  # before 5.23 Trainer has no such argument here
            self.args.hub_private_repo = private
        try:
            super().init_hf_repo(token)
            api = HfApi(token=token or self.args.hub_token)
            self.is_private = retry(lambda: api.repo_info(self.hub_model_id)).private
        except HTTPError as error:
            raise UserError(
                f"hub_model_id={name} is no place to push to: {explain_hub_error(error)}."
            ) from error
        if not self.is_private and self.args.hub_private_repo:
            raise UserError(
                f"hub_model_id={self.hub_model_id} exists and is public: make it private on its "
                "page, or leave out hub_private_repo."
            )

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the card into `output_dir`, where a person's own edits stay."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            facts = {"num_parameters": self.model.num_parameters()}
            card = render_model_card(self.model.config, facts, name=folder.absolute().name)
            write_card(card, folder / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> Release | None:
        """Save to `output_dir` and push that as `hub.push_to_hub` does; always waits for the end.

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
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
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
            num_parameters=self.model.num_parameters(),
            message=f"Training in progress, step {self.state.global_step}",
            private=self.is_private,
            skip_waiting=not (args.hub_always_push or strategy == HubStrategy.ALL_CHECKPOINTS),
            token=args.hub_token,
        )

    def _finish_current_push(self) -> None:
        if self.hub_model_id is None:
            return
        for error in self.pushes.finish():
            logger.error(
                f"A push during training failed: {error} To push what was trained: hf-nanogpt push "
                f"{shlex.quote(self.args.output_dir)} {self.hub_model_id}"
            )
