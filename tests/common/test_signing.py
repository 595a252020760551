"""Signatures: the published vectors, and no signature for anything but what was signed."""

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from common.canonical import canonical_json, sha256_hex
from common.errors import SignatureError
from common.signing import (
    generate_key,
    load_private_key,
    load_public_key,
    private_pem,
    public_pem,
    sign,
    verify,
)

# RFC 8032, section 7.1, TEST 1024.
LONG = (
    "08b8b2b733424243760fe426a4b54908632110a66c2f6591eabd3345e3e4eb98fa6e264bf09efe12ee50f8f54e9f77b1e355"
    "f6c50544e23fb1433ddf73be84d879de7c0046dc4996d9e773f4bc9efe5738829adb26c81b37c93a1b270b20329d658675fc"
    "6ea534e0810a4432826bf58c941efb65d57a338bbd2e26640f89ffbc1a858efcb8550ee3a5e1998bd177e93a7363c344fe6b"
    "199ee5d02e82d522c4feba15452f80288a821a579116ec6dad2b3b310da903401aa62100ab5d1a36553e06203b33890cc9b8"
    "32f79ef80560ccb9a39ce767967ed628c6ad573cb116dbefefd75499da96bd68a8a97b928a8bbc103b6621fcde2beca1231d"
    "206be6cd9ec7aff6f6c94fcd7204ed3455c68c83f4a41da4af2b74ef5c53f1d8ac70bdcb7ed185ce81bd84359d44254d9562"
    "9e9855a94a7c1958d1f8ada5d0532ed8a5aa3fb2d17ba70eb6248e594e1a2297acbbb39d502f1a8c6eb6f1ce22b3de1a1f40"
    "cc24554119a831a9aad6079cad88425de6bde1a9187ebb6092cf67bf2b13fd65f27088d78b7e883c8759d2c4f5c65adb7553"
    "878ad575f9fad878e80a0c9ba63bcbcc2732e69485bbc9c90bfbd62481d9089beccf80cfe2df16a2cf65bd92dd597b0707e0"
    "917af48bbb75fed413d238f5555a7a569d80c3414a8d0859dc65a46128bab27af87a71314f318c782b23ebfe808b82b0ce26"
    "401d2e22f04d83d1255dc51addd3b75a2b1ae0784504df543af8969be3ea7082ff7fc9888c144da2af58429ec96031dbcad3"
    "dad9af0dcbaaaf268cb8fcffead94f3c7ca495e056a9b47acdb751fb73e666c6c655ade8297297d07ad1ba5e43f1bca32301"
    "651339e22904cc8c42f58c30c04aafdb038dda0847dd988dcda6f3bfd15c4b4c4525004aa06eeff8ca61783aacec57fb3d1f"
    "92b0fe2fd1a85f6724517b65e614ad6808d6f6ee34dff7310fdc82aebfd904b01e1dc54b2927094b2db68d6f903b68401ade"
    "bf5a7e08d78ff4ef5d63653a65040cf9bfd4aca7984a74d37145986780fc0b16ac451649de6188a7dbdf191f64b5fc5e2ab4"
    "7b57f7f7276cd419c17a3ca8e1b939ae49e488acba6b965610b5480109c8b17b80e1b7b750dfc7598d5d5011fd2dcc5600a3"
    "2ef5b52a1ecc820e308aa342721aac0943bf6686b64b2579376504ccc493d97e6aed3fb0f9cd71a43dd497f01f17c0e2cb37"
    "97aa2a2f256656168e6c496afc5fb93246f6b1116398a346f1a641f3b041e989f7914f90cc2c7fff357876e506b50d334ba7"
    "7c225bc307ba537152f3f1610e4eafe595f6d9d90d11faa933a15ef1369546868a7f3a45a96768d40fd9d03412c091c6315c"
    "f4fde7cb68606937380db2eaaa707b4c4185c32eddcdd306705e4dc1ffc872eeee475a64dfac86aba41c0618983f8741c5ef"
    "68d3a101e8a3b8cac60c905c15fc910840b94c00a0b9d0"
)
#: RFC 8032, section 7.1: secret key, public key, message, signature.
VECTORS = {
    "1": (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    "2": (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    "3": (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    "1024": (
        "f5e5767cf153319517630f226876b86c8160cc583bc013744c6bf255f5cc0ee5",
        "278117fc144c72340f67d0f2316e8386ceffbf2b2428c9c51fef7c597f1d426e",
        LONG,
        "0aab4c900501b3e24d7cdf4663326a3a87df5e4843b2cbdb67cbf6e460fec350"
        "aa5371b1508f9f4528ecea23c436d94b5e8fcd4f681e30a6ac00a9704a188a03",
    ),
}

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # all of Unicode
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_published_vectors_through_our_key_files(vector: tuple[str, str, str, str]) -> None:
    secret, public, message, signature = (bytes.fromhex(part) for part in vector)
    key = load_private_key(private_pem(Ed25519PrivateKey.from_private_bytes(secret)))
    own = load_public_key(public_pem(key.public_key()))
    theirs = load_public_key(public_pem(Ed25519PublicKey.from_public_bytes(public)))
    assert own.public_bytes_raw() == public
    assert key.sign(message) == signature
    theirs.verify(signature, message)


def test_what_is_signed_is_purpose_and_canonical_json() -> None:
    """Another implementation needs no more than this to check a study."""
    key = generate_key()
    signature = sign(key, "study", {"b": 1, "a": [True, "ä"]})
    key.public_key().verify(signature, b'wardround/1 study\n{"a":[true,"\xc3\xa4"],"b":1}')


@given(JSON)
def test_a_signature_verifies(value: Any) -> None:
    key = generate_key()
    signature = sign(key, "study", value)
    assert len(signature) == 64
    verify(key.public_key(), "study", value, signature)


@given(st.integers(0, 511))
def test_any_changed_bit_of_a_signature_is_refused(bit: int) -> None:
    key = generate_key()
    signature = bytearray(sign(key, "study", {"rounds": 3}))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureError, match="the signature of the study does not verify"):
        verify(key.public_key(), "study", {"rounds": 3}, bytes(signature))


@pytest.mark.parametrize(
    ("purpose", "value"),
    [
        ("study", {"rounds": 4}),
        ("study", {"rounds": 3.0}),
        ("study", {"rounds": "3"}),
        ("study", {"Rounds": 3}),
        ("study", {"rounds": 3, "sites": None}),
        ("study", [["rounds", 3]]),
        ("enrolment", {"rounds": 3}),
        ("study ", {"rounds": 3}),
        ("", {"rounds": 3}),
    ],
)
def test_another_value_or_purpose_is_refused(purpose: str, value: Any) -> None:
    key = generate_key()
    signature = sign(key, "study", {"rounds": 3})
    with pytest.raises(SignatureError):
        verify(key.public_key(), purpose, value, signature)


def test_another_key_is_refused() -> None:
    signature = sign(generate_key(), "study", {"rounds": 3})
    with pytest.raises(SignatureError, match="another key"):
        verify(generate_key().public_key(), "study", {"rounds": 3}, signature)


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_a_signature_of_the_wrong_length_is_refused(length: int) -> None:
    key = generate_key()
    with pytest.raises(SignatureError):
        verify(key.public_key(), "study", {}, (sign(key, "study", {}) * 2)[:length])


def test_purpose_and_value_cannot_run_into_each_other() -> None:
    """JSON has no bare line break, so the last one in a message ends the purpose."""
    key = generate_key()
    signature = sign(key, "a", "b\nc")
    with pytest.raises(SignatureError):
        verify(key.public_key(), 'a\n"b', "c", signature)


def test_a_changed_group_order_is_no_second_signature() -> None:
    """RFC 8032, section 5.1.7: S must be below the group order, or every signature would have a twin."""
    key = generate_key()
    signature = sign(key, "study", {})
    order = 2**252 + 27742317777372353535851937790883648493
    twin = int.from_bytes(signature[32:], "little") + order
    with pytest.raises(SignatureError):
        verify(key.public_key(), "study", {}, signature[:32] + twin.to_bytes(32, "little"))


def _pem(kind: str, der: bytes) -> bytes:
    return f"-----BEGIN {kind} KEY-----\n{base64.b64encode(der).decode()}\n-----END {kind} KEY-----\n".encode()


OTHER_KEYS = {
    "RSA": rsa.generate_private_key(65537, 2048),
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "Ed448": ed448.Ed448PrivateKey.generate(),
}


@pytest.mark.parametrize("key", OTHER_KEYS.values(), ids=OTHER_KEYS)
def test_keys_of_another_kind_are_refused(key: Any) -> None:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(SignatureError, match="Ed25519 private key"):
        load_private_key(private)
    with pytest.raises(SignatureError, match="Ed25519 public key"):
        load_public_key(public)


def test_what_is_no_key_at_all_is_refused() -> None:
    key = generate_key()
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    unknown = bytes.fromhex("06032a0304")  # an algorithm that nobody has registered
    private = _pem("PRIVATE", bytes.fromhex("302e0201003005") + unknown + bytes.fromhex("04220420") + bytes(32))
    public = _pem("PUBLIC", bytes.fromhex("302a3005") + unknown + bytes.fromhex("032100") + bytes(32))
    for pem in (b"", b"garbage", encrypted, public_pem(key.public_key()), private, private_pem(key)[:80]):
        with pytest.raises(SignatureError):
            load_private_key(pem)
    for pem in (b"", b"garbage", private_pem(key), public, public_pem(key.public_key())[:60]):
        with pytest.raises(SignatureError):
            load_public_key(pem)


def test_keys_differ() -> None:
    assert private_pem(generate_key()) != private_pem(generate_key())


@given(st.dictionaries(TEXT, JSON), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)


@given(JSON)
def test_canonical_json_reads_back(value: Any) -> None:
    data = canonical_json(value)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(value: float) -> None:
    assert json.loads(canonical_json([value]))[0].hex() == value.hex()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "\ud800"])
def test_numbers_and_text_without_a_meaning_are_refused(value: Any) -> None:
    for holder in (value, [value], {"a": {"b": value}}):
        with pytest.raises(ValueError, match=r"JSON compliant|surrogates"):
            canonical_json(holder)
        with pytest.raises(ValueError, match=r"JSON compliant|surrogates"):
            sign(generate_key(), "study", holder)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), {("a", "b"): 1}])
def test_what_json_cannot_express_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_canonical_json_has_one_form() -> None:
    assert canonical_json({"b": [1, 1.5, None, False], "a": "é\n"}) == '{"a":"é\\n","b":[1,1.5,null,false]}'.encode()


def test_sha_256_is_sha_256() -> None:
    """FIPS 180-2, appendix B.1."""
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
