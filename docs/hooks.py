"""Lets the site hold the result files that pages link to: they lie outside of docs/, where mkdocs finds nothing."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"


def on_files(files, config):
    """Add the result files to the site, under the path that they have in the project."""
    for path in sorted((ROOT / RESULTS).iterdir()):
        files.append(File(f"{RESULTS}/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, **kwargs):
    """Let links to result files, which count from docs/, lead to where they are in the site."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
