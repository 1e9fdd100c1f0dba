"""The catalogue: what is recognised as a public registry, and what a developer's machine keeps."""

from __future__ import annotations

from datetime import date

import pytest

from enforcer.catalogue import catalogue, known_names, registry_of
from enforcer.policy import Note, load_preset


def test_every_name_says_where_it_is_known_from() -> None:
    for known in known_names():
        assert known.registry
        assert known.source.startswith("https://")
        assert date(2026, 1, 1) < known.date < date(2100, 1, 1)
        assert known.note is not Note.SHARED  # a name that serves other things too recognises nothing
    assert len(catalogue()) == len(set(catalogue())) == len(known_names())


def test_a_wildcard_never_covers_a_whole_top_level_domain() -> None:
    assert all("." in pattern.name for pattern in catalogue() if pattern.wildcard)


@pytest.mark.parametrize(
    ("name", "registry"),
    [
        ("registry-1.docker.io", "Docker Hub"),
        ("mirror.gcr.io", "Docker Hub"),
        ("docker.m.daocloud.io", "Docker Hub"),
        ("GHCR.io.", "GitHub"),
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com", "Amazon ECR"),
        ("123456789012.dkr-ecr.us-gov-west-1.on.aws", "Amazon ECR"),
        ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "Amazon ECR"),
        ("public.ecr.aws", "Amazon ECR Public"),
        ("europe-west4-docker.pkg.dev", "Google Artifact Registry"),
        ("us-docker.pkg.dev", "Google Artifact Registry"),
        ("eu.gcr.io", "Google Container Registry"),
        ("k8s.gcr.io", "Kubernetes"),
        ("corp.azurecr.io", "Azure Container Registry"),
        ("westeurope.data.mcr.microsoft.com", "Microsoft Artifact Registry"),
        ("quay.io", "Quay"),
        ("fra.ocir.io", "Oracle Cloud"),
        ("crpi-x.cn-hangzhou.personal.cr.aliyuncs.com", "Alibaba Cloud"),
        ("nvcr.io", "NVIDIA"),
    ],
)
def test_a_registrys_front_end_is_recognised(name: str, registry: str) -> None:
    known = registry_of(name)
    assert known is not None
    assert known.registry == registry
    assert known.pattern in catalogue()
    assert known.pattern.matches(name.lower().removesuffix("."))


@pytest.mark.parametrize(
    "name",
    [
        # browsers and package managers
        *("rubygems.org", "repo.maven.apache.org", "api.nuget.org", "dl.fedoraproject.org", "packages.microsoft.com"),
        *("github.com", "gitlab.com", "codeberg.org", "hub.docker.com", "download.docker.com", "registry.terraform.io"),
        *("us-python.pkg.dev", "europe-npm.pkg.dev", "npm.pkg.github.com", "corp.jfrog.io", "aws.amazon.com"),
        # what stores layers, and other things
        *("storage.googleapis.com", "s3.amazonaws.com", "x.blob.core.windows.net", "objects.githubusercontent.com"),
        *("d39mqg4b1dx9z1.cloudfront.net", "x.r2.cloudflarestorage.com"),
        # only alike
        *("dkr.ecr.eu-west-1.amazonaws.com", "azurecr.io", "pkg.dev", "ghcr.io.evil.test", "notghcr.io", "io", "", "."),
    ],
)
def test_what_is_no_registrys_own_name_is_not(name: str) -> None:
    assert registry_of(name) is None


@pytest.mark.parametrize("preset", ["docker-hub", "ghcr", "gitlab", "google", "kubernetes", "mcr", "quay"])
def test_every_preset_that_ships_is_a_registry_of_the_catalogue(preset: str) -> None:
    names = [host.name.replace("*", "europe-west1-docker" if "pkg.dev" in host.name else "x")
             for host in load_preset(preset).hosts]  # fmt: skip
    assert any(registry_of(name) for name in names)
