"""What a caller needs for each method: the one map, and deny by default for whatever is not in it."""

from enum import StrEnum


class Scope(StrEnum):
    """A right a key, token or certificate carries."""

    EVENTS_WRITE = "events:write"
    IDENTITY_READ = "identity:read"
    IDENTITY_WRITE = "identity:write"
    PROFILE_READ = "profile:read"
    CATALOG_READ = "catalog:read"
    CATALOG_WRITE = "catalog:write"
    FEATURES_READ = "features:read"
    RECOMMENDATIONS_READ = "recommendations:read"
    TEXTS_READ = "texts:read"
    ASSISTANT_ASK = "assistant:ask"
    ARTICLES_READ = "articles:read"
    ARTICLES_WRITE = "articles:write"
    MODELS_READ = "models:read"
    ADMIN = "admin"


# What a channel's backend needs for its customers; the catalogue's owner and operators are others.
CHANNEL_SCOPES = frozenset(
    {
        Scope.EVENTS_WRITE,
        Scope.IDENTITY_READ,
        Scope.IDENTITY_WRITE,
        Scope.PROFILE_READ,
        Scope.CATALOG_READ,
        Scope.FEATURES_READ,
        Scope.RECOMMENDATIONS_READ,
        Scope.TEXTS_READ,
        Scope.ASSISTANT_ASK,
        Scope.ARTICLES_READ,
    }
)
ALL_SCOPES = frozenset(Scope)
# An item has one title, one price and one list of channels for the whole shop, and so has an article: nobody writes it for one channel.
SHOP_SCOPES = frozenset({Scope.CATALOG_WRITE, Scope.ARTICLES_WRITE})

SCOPE_OF = {
    "EventService/RecordEvents": Scope.EVENTS_WRITE,
    "EventService/StreamEvents": Scope.EVENTS_WRITE,
    "IdentityService/ResolveIdentity": Scope.IDENTITY_READ,
    "IdentityService/LinkIdentities": Scope.IDENTITY_WRITE,
    "IdentityService/GetIdentityGraph": Scope.IDENTITY_READ,
    "IdentityService/UnlinkIdentity": Scope.ADMIN,
    "IdentityService/ForgetUser": Scope.ADMIN,
    "ProfileService/GetProfile": Scope.PROFILE_READ,
    "CatalogService/UpsertItems": Scope.CATALOG_WRITE,
    "CatalogService/GetItems": Scope.CATALOG_READ,
    "CatalogService/ListItems": Scope.CATALOG_READ,
    "FeatureService/GetOnlineFeatures": Scope.FEATURES_READ,
    "RecommendationService/Recommend": Scope.RECOMMENDATIONS_READ,
    "RecommendationService/RankItems": Scope.RECOMMENDATIONS_READ,
    "RecommendationService/SimilarItems": Scope.RECOMMENDATIONS_READ,
    "SearchService/Search": Scope.RECOMMENDATIONS_READ,
    "SearchService/Suggest": Scope.CATALOG_READ,
    "UnderstandingService/EmbedText": Scope.TEXTS_READ,
    "AssistantService/Ask": Scope.ASSISTANT_ASK,
    "ArticleService/UpsertArticles": Scope.ARTICLES_WRITE,
    "ArticleService/ListArticles": Scope.ARTICLES_READ,
    "ArticleService/DeleteArticles": Scope.ARTICLES_WRITE,
    "UnderstandingService/DetectIntent": Scope.TEXTS_READ,
    "UnderstandingService/AnalyzeSentiment": Scope.TEXTS_READ,
    "ModelService/ListModels": Scope.MODELS_READ,
    "ModelService/GetActiveModel": Scope.MODELS_READ,
    "ModelService/ListReplicas": Scope.MODELS_READ,
    "ModelService/ActivateModel": Scope.ADMIN,
}

# Reads that write when a flag of the request has a value: flag, value, and the scope needed on top.
SCOPE_OF_FLAG = {
    "IdentityService/ResolveIdentity": ("create_if_missing", True, Scope.IDENTITY_WRITE),
    "SearchService/Search": ("skip_recording", False, Scope.EVENTS_WRITE),
}

# Methods that record what their subject did: an identity in it is one that the caller writes, as in an event.
RECORDING = frozenset({"AssistantService/Ask"})

# Served on the admin port; the first of them there alone. An operator looks at models where they are moved.
ADMIN_PORT_SCOPES = frozenset({Scope.ADMIN, Scope.MODELS_READ})
