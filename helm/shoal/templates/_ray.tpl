{{- define "shoal.rayStart" -}}
object-store-memory: {{ int64 .Values.ray.objectStoreBytes | quote }}
{{- end -}}

{{- /* gcsFaultToleranceOptions; empty where there are none. */}}
{{- define "shoal.gcs" -}}
{{- with .Values.ray.gcs }}
{{- if eq .faultTolerance "embedded" -}}
backend: rocksdb
storage:
  size: {{ .size | quote }}
  deletionPolicy: {{ .deletionPolicy }}
  {{- with .storageClass }}
  storageClassName: {{ . | quote }}
  {{- end }}
{{- else if eq .faultTolerance "redis" -}}
redisAddress: {{ .redisAddress | quote }}
{{- with .redisSecret }}
redisPassword:
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: password
{{- end }}
{{- end }}
{{- end }}
{{- end -}}
