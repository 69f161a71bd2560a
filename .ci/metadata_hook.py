"""What pyproject.toml cannot say by itself: project URLs, and a README whose relative links work on PyPI."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata):
        text = Path(self.root, 'README.md').read_text(encoding='utf-8')
        repository = self.config['repository'].rstrip('/')
        metadata['urls'] = {'Repository': repository} if repository else {}
        metadata['readme'] = {'content-type': 'text/markdown', 'text': absolute_links(text, repository)}


def absolute_links(text, repository):
    """Let the relative links of a Markdown text lead into the repository, and its images to their bytes."""
    if not repository:
        return text
    relative = r'\]\((?!https?:|#)([^)\s]+)\)'
    text = re.sub(rf'(!\[[^\]]*){relative}', rf'\1]({repository}/raw/main/\2)', text)
    return re.sub(relative, rf']({repository}/blob/main/\1)', text)
