"""Route for links that sign a browser in."""

from fastapi import APIRouter

from service.api.auth import Reader
from service.api.dependencies import Credentials, PublicUrl
from service.api.idempotency import KnownCaller
from service.api.schemas.access import MakeSignInLink, SignInLink
from service.api.sign_in import sign_in_url
from service.domain.access import SIGN_IN_LINK_LIFETIME, CredentialKind

router = APIRouter(prefix="/v1", tags=["access"], route_class=KnownCaller)


@router.post("/sign-in-links", status_code=201)
async def make_sign_in_link(
    body: MakeSignInLink, caller: Reader, credential_store: Credentials, public_url: PublicUrl
) -> SignInLink:
    """Create a link that signs a browser in once within ten minutes.

    The browser may then read MLflow's pages for 12 hours, as long as the token is valid.
    """
    code = await credential_store.add_for_token(
        CredentialKind.SIGN_IN, caller.token_id, SIGN_IN_LINK_LIFETIME
    )
    return SignInLink(url=sign_in_url(public_url, code, body.next))
