"""An export on the Hugging Face Hub, where a preset asks for it by name.

In:    the folder of an export; a repository's name; the token in the environment or in .env
Out:   the repository's address
State: the repository
"""

from pathlib import Path

from core.errors import MissingPackage, SourceUnavailable, UserError
from core.hf_hub import check_reachable, explain
from core.optional_packages import need


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder as one commit, and return the repository's address. Raises UserError; the
    folder stays."""
    hub = need("huggingface_hub", "huggingface_hub", MissingPackage)
    kept = f"{folder} is written and stays: start again to push it"
    if hub.get_token() is None:
        raise UserError(
            f'export.push_to "{repo}" needs a token with write access: put it as HF_TOKEN=... into '
            f"the file .env beside main.py. {kept}."
        )
    try:
        check_reachable()
        hub.utils.disable_progress_bars()
        api = hub.HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Exported by zeroarg")
    except SourceUnavailable as error:
        raise UserError(f'export.push_to "{repo}": {error}. {kept}.') from None
    except Exception as error:  # any error of the library, or of the HTTP client under it
        reason = explain(error, repo, kind="")
        raise UserError(f'export.push_to "{repo}": {reason}. {kept}.') from None
    return str(address)
