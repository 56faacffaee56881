"""CANN's declarations, argument by argument, and the search for its libraries."""

import itertools
import os
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
from support import process
from support.internals import library

FFI = Path(__file__).parents[2] / "ffi"
HEADERS = FFI / "standin" / "include"  # written from CANN's documentation
LIBRARY = library.path()
CXX = os.environ.get("CXX") or shutil.which("g++") or "g++"

OPERATOR = ("aclnnDequantRopeQuantKvcacheGetWorkspaceSize", "aclnnDequantRopeQuantKvcache")
EXECUTOR = ("aclSetAclOpExecutorRepeatable", "aclDestroyAclOpExecutor")
BASE = (
    "aclCreateTensor", "aclDestroyTensor", "aclCreateIntArray", "aclDestroyIntArray", *EXECUTOR,
)  # fmt: skip


# Declarations


def prototypes():
    """(header, function, parameters) of every function in the headers."""
    for header in sorted(HEADERS.rglob("*.h")):
        text = header.read_text()
        for match in re.finditer(r"(acl\w+)\(([^()]*)\);", text):
            parameters = [p.strip() for p in match[2].split(",") if p.strip()]
            yield header.relative_to(HEADERS), match[1], parameters


def changed(parameter):
    """The parameter with another type."""
    name = re.search(r"\w+$", parameter)[0]
    return f"float {name}"


def check_headers(include):
    command = [
        CXX,
        "-std=c++17",
        "-fsyntax-only",
        f"-I{FFI}",
        f"-I{include}",
        FFI / "ascend" / "cann_check.cc",
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_headers_declare_nine_functions():
    found = {function: len(parameters) for _, function, parameters in prototypes()}
    assert found == {
        "aclCreateTensor": 9, "aclDestroyTensor": 1, "aclCreateIntArray": 2,
        "aclDestroyIntArray": 1, "aclSetAclOpExecutorRepeatable": 1, "aclDestroyAclOpExecutor": 1,
        "aclnnDequantRopeQuantKvcacheGetWorkspaceSize": 23, "aclnnDequantRopeQuantKvcache": 4,
        "aclGetRecentErrMsg": 0,
    }  # fmt: skip


def test_declarations_match():
    done = check_headers(HEADERS)
    assert done.returncode == 0, done.stderr


def mutations():
    """(name, header, old, new): one argument changed, or one constant."""
    for header, function, parameters in prototypes():
        for i, parameter in enumerate(parameters):
            yield f"{function}-{i}", header, parameter, changed(parameter)
    meta = Path("aclnn/acl_meta.h")
    for old, new in [
        ("ACL_FLOAT = 0", "ACL_FLOAT = 9"), ("ACL_FLOAT16 = 1", "ACL_FLOAT16 = 9"),
        ("ACL_INT8 = 2", "ACL_INT8 = 9"), ("ACL_INT32 = 3", "ACL_INT32 = 9"),
        ("ACL_BF16 = 27", "ACL_BF16 = 9"), ("ACL_FORMAT_ND = 2", "ACL_FORMAT_ND = 9"),
        ("typedef int32_t aclnnStatus", "typedef int64_t aclnnStatus"),
    ]:  # fmt: skip
        yield old, meta, old, new
    errno = Path("aclnn/opdev/op_errno.h")
    for match in re.finditer(r"#define (ACLNN_\w+ )(\d+)\n", (HEADERS / errno).read_text()):
        yield match[1], errno, match[0], f"#define {match[1]}9\n"


def test_every_change_of_a_declaration_is_seen(tmp_path):
    unseen = []
    for name, header, old, new in mutations():
        include = tmp_path / "include"
        shutil.rmtree(include, ignore_errors=True)
        shutil.copytree(HEADERS, include)
        text = (include / header).read_text()
        function = name.split("-")[0]
        start = re.search(rf"\b{function}\(", text).end() if function.startswith("acl") else 0
        position = text.index(old, start)
        (include / header).write_text(text[:position] + new + text[position + len(old) :])
        if check_headers(include).returncode == 0:
            unseen.append(name)
    assert unseen == []


# Search


def make_library(path, functions):
    path.parent.mkdir(parents=True, exist_ok=True)
    source = "".join(f"int {name}(void) {{ return 0; }}\n" for name in functions)
    command = ["gcc" if CXX == "g++" else CXX, "-xc", "-shared", "-fPIC", "-o", path, "-"]
    subprocess.run(command, input=source, text=True, check=True)
    return str(path)


@pytest.fixture(scope="module")
def toolkits(tmp_path_factory):
    """Toolkits by name: what each has, and what it lacks."""
    root = tmp_path_factory.mktemp("toolkits")
    for name in ("custom", "vendors/first", "vendors/second"):
        make_library(root / name / "op_api/lib/libcust_opapi.so", OPERATOR)
    for name in ("old", "split", "without_base", "without_runtime", "early"):
        lib = root / name / "lib64"
        make_library(lib / "libopapi.so", OPERATOR if name != "split" else ())
        if name == "split":
            make_library(lib / "libopapi_math.so", ())
            make_library(lib / "libopapi_transformer.so", OPERATOR)
        if name != "without_base":
            early = [function for function in BASE if function not in EXECUTOR]
            make_library(lib / "libnnopbase.so", early if name == "early" else BASE)
        if name != "without_runtime":
            make_library(lib / "libascendcl.so", ("aclGetRecentErrMsg",))
    return root


def search(**environment):
    """What the library finds in a fresh process: (bound, text)."""
    code = f"""
        import ctypes, threading
        library = ctypes.CDLL({str(LIBRARY)!r})
        texts = []
        def ask():
            text = ctypes.c_char_p()
            texts.append((library.jax_kvcache_cann(ctypes.byref(text)), text.value.decode()))
        threads = [threading.Thread(target=ask) for _ in range(8)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert len(set(texts)) == 1, texts
        print(*texts[0], sep="\\n")
    """
    unset = {name: None for name in os.environ if name.startswith(("ASCEND", "LD_LIBRARY"))}
    written = process.run("-S", "-c", textwrap.dedent(code), **unset | environment)
    bound, text = written.strip().split("\n", 1)
    return bound == "1", text


def files(root, *names):
    return ", ".join(str(root / name) for name in names)


def test_old_toolkit(toolkits):
    base = ("old/lib64/libopapi.so", "old/lib64/libnnopbase.so", "old/lib64/libascendcl.so")
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        assert search(**{variable: f"{toolkits}/old"}) == (True, files(toolkits, *base))


def test_split_toolkit(toolkits):
    lib = "split/lib64/lib"
    found = files(toolkits, f"{lib}opapi_transformer.so", f"{lib}nnopbase.so", f"{lib}ascendcl.so")
    assert search(ASCEND_HOME_PATH=f"{toolkits}/split") == (True, found)


def test_the_loaders_path_comes_before_the_toolkit(toolkits):
    bound, text = search(
        LD_LIBRARY_PATH=f"{toolkits}/old/lib64", ASCEND_HOME_PATH=f"{toolkits}/split"
    )
    assert bound
    assert text.startswith("libopapi.so") or "old/lib64/libopapi.so" in text


def test_custom_operators_come_first(toolkits):
    bound, text = search(
        ASCEND_CUSTOM_OPP_PATH=f"{toolkits}/nothing:{toolkits}/custom",
        ASCEND_HOME_PATH=f"{toolkits}/old",
    )
    assert bound
    assert text.split(", ")[0] == str(toolkits / "custom/op_api/lib/libcust_opapi.so")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ("load_priority=first,second\n", "vendors/first"),
        ("load_priority=second,first", "vendors/second"),
        ("# packages\nload_priority=not_there, second ,first\r\n", "vendors/second"),
        ("load_priority=\n", "old"),
        ("priority=first\n", "old"),
        (None, "old"),
    ],
)
def test_vendors_packages_by_priority(config, found, toolkits):
    ini = toolkits / "vendors/config.ini"
    ini.unlink(missing_ok=True)
    if config is not None:
        ini.write_bytes(config.encode())
    bound, text = search(ASCEND_OPP_PATH=str(toolkits), ASCEND_HOME_PATH=f"{toolkits}/old")
    assert bound
    place = "lib64/libopapi.so" if found == "old" else "op_api/lib/libcust_opapi.so"
    assert text.split(", ")[0] == str(toolkits / found / place)


def test_custom_operators_come_before_vendors(toolkits):
    (toolkits / "vendors/config.ini").write_text("load_priority=first")
    _, text = search(
        ASCEND_OPP_PATH=str(toolkits),
        ASCEND_CUSTOM_OPP_PATH=f"{toolkits}/custom",
        ASCEND_HOME_PATH=f"{toolkits}/old",
    )
    assert text.split(", ")[0] == str(toolkits / "custom/op_api/lib/libcust_opapi.so")


def test_a_release_without_the_functions_that_destroy_executors(toolkits):
    bound, text = search(ASCEND_HOME_PATH=f"{toolkits}/early")
    assert bound
    assert text.endswith("libascendcl.so; without aclDestroyAclOpExecutor")


def test_nothing_found_names_every_place(toolkits, tmp_path):
    (tmp_path / "vendors").mkdir()
    (tmp_path / "vendors/config.ini").write_text("load_priority=x,y")
    bound, text = search(
        ASCEND_CUSTOM_OPP_PATH="/a:/b", ASCEND_HOME_PATH="/c", ASCEND_TOOLKIT_HOME="/d",
        ASCEND_OPP_PATH=str(tmp_path),
    )  # fmt: skip
    assert not bound
    assert text.startswith("CANN was not found: no library with aclnnDequantRopeQuantKvcache. Run")
    places = re.findall(r"\n  (\S+): ", text)
    assert places == [
        "/a/op_api/lib/libcust_opapi.so", "/b/op_api/lib/libcust_opapi.so",
        *[f"{tmp_path}/vendors/{name}/op_api/lib/libcust_opapi.so" for name in "xy"],
        "libopapi.so", "/c/lib64/libopapi.so", "/d/lib64/libopapi.so",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("toolkit", "missing"),
    [
        ("without_base", r"no aclCreateTensor \(of libnnopbase.so\)"),
        ("without_runtime", r"no aclGetRecentErrMsg \(of libascendcl.so\)"),
    ],
)
def test_a_part_missing(toolkit, missing, toolkits):
    bound, text = search(ASCEND_HOME_PATH=f"{toolkits}/{toolkit}")
    assert not bound
    assert re.search(missing, text)


def test_a_library_without_the_operator_is_named(toolkits, tmp_path):
    make_library(tmp_path / "lib64/libopapi.so", ())
    bound, text = search(ASCEND_HOME_PATH=str(tmp_path))
    assert not bound
    assert f"{tmp_path}/lib64/libopapi.so: has no aclnnDequantRopeQuantKvcache" in text


def test_parameters_are_mutated_one_by_one():
    names = [name for name, *_ in itertools.islice(mutations(), 100)]
    assert len(names) == len(set(names)) == 9 + 1 + 2 + 1 + 1 + 1 + 23 + 4 + 7 + 13


def test_headers_without_status_codes(tmp_path):
    """Not every package of CANN's headers has them."""
    include = tmp_path / "include"
    shutil.copytree(HEADERS, include)
    (include / "aclnn/opdev/op_errno.h").unlink()
    done = check_headers(include)
    assert done.returncode == 0, done.stderr
