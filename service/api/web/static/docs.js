const place = document.getElementById("swagger-ui");
SwaggerUIBundle({ url: place.dataset.url, domNode: place, validatorUrl: null, deepLinking: true, defaultModelsExpandDepth: 0 });
